"""Wrong implementations, each one small edit of src/privzoo away, and the tests that must turn red for it.

tests/test_mutants.py proves every line of this list. A new one: make the edit by hand, see which test fails, write it down
here; if none fails, write the test first. `old` must occur exactly once in its file, so a change of the code that a mutant
is about makes the mutant fail by name rather than vanish.
"""

import runpy
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """One wrong implementation.

    Attributes:
        name: what it does wrong.
        lines: lines of the list of privacy traps that it stands for; "-": a result that would be silently wrong.
        file: under src/privzoo.
        old: text that occurs exactly once in the file.
        new: what is put in its place.
        tests: node ids; each of them must fail, and pass without the edit. A test that runs in parts fails if one part does.
    """

    name: str
    lines: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PLAN, ACCOUNTING = "tests/privacy/test_plan.py::test_", "tests/privacy/test_accounting.py::test_"
STREAMS, SAMPLING = "tests/privacy/test_streams.py::test_", "tests/privacy/test_sampling.py::test_"
NOISE, RELEASE = "tests/privacy/test_noise.py::test_", "tests/privacy/test_release.py::test_"
CURVES = "tests/test_curves.py::test_"
CALLBACK, AFFORDABLE = "tests/privacy/test_callback.py::test_", "tests/privacy/test_affordable.py::test_"

ADD = "flat[begins - first : ends - first].add_(own.to(flat.device), alpha=scale)"
NOISE_STD = "scale = setting.noise_multiplier * setting.clip_norm"
NOISE_STREAM = 'self.key.stream("noise", release, self.digest + weights, name, block)'
SIZE_OF_NOISE = (NOISE + "noise_has_standard_deviation_sigma_times_clip_norm", RELEASE + "noise_of_the_update")

NOISE_MUTANTS = [
    Mutant("drop the noise", "6", "privacy/noise.py", ADD, "assert drawn.size", SIZE_OF_NOISE),
    Mutant("halve sigma", "6", "privacy/noise.py", NOISE_STD, f"{NOISE_STD} / 2", SIZE_OF_NOISE),
    Mutant("noise without the clip norm", "6", "privacy/noise.py", NOISE_STD, "scale = setting.noise_multiplier",
           SIZE_OF_NOISE),
    Mutant("noise for the mean added to the sum", "6", "privacy/noise.py", NOISE_STD, f"{NOISE_STD} / setting.batch_size",
           SIZE_OF_NOISE),
    Mutant("noise of the first phase throughout", "6", "privacy/noise.py", "setting = self.plan.at(release)",
           "setting = self.plan.at(0)", (NOISE + "noise_follows_the_phase",)),
    Mutant("noise on a copy of the sum", "6", "privacy/noise.py", "flat = here.view(-1)", "flat = here.view(-1).clone()",
           (NOISE + "noise_is_added_in_place",)),
    Mutant("noise of one block for all", "36", "privacy/noise.py", NOISE_STREAM, NOISE_STREAM.replace("block", "0"),
           (NOISE + "blocks_of_a_tensor_have_independent_noise",)),
    Mutant("one noise stream for all releases", "36", "privacy/noise.py", NOISE_STREAM,
           'self.key.stream("noise", 0, self.digest, name, block)',
           (NOISE + "all_releases_of_a_run_have_independent_noise",
            RELEASE + "noise_of_one_release_is_not_that_of_another")),
    Mutant("noise not keyed by the weights", "35", "privacy/noise.py", NOISE_STREAM, NOISE_STREAM.replace(" + weights", ""),
           (NOISE + "noise_is_fresh_wherever_the_sum_may_differ[weights]",)),
    Mutant("noise not keyed by the configuration", "35 36", "privacy/noise.py", NOISE_STREAM,
           NOISE_STREAM.replace("self.digest + ", ""),
           (NOISE + "runs_that_differ_only_in_epsilon_share_neither_draw_nor_noise",)),
    Mutant("all tensors share their noise", "36", "privacy/noise.py", NOISE_STREAM, NOISE_STREAM.replace("name", '""'),
           (NOISE + "noise_is_fresh_wherever_the_sum_may_differ[name]",)),
    Mutant("noise from torch's generator", "36", "privacy/noise.py", ADD,
           "flat[begins - first : ends - first].add_(torch.randn(ends - begins).to(flat.device), alpha=scale)",
           (NOISE + "noise_is_not_that_of_a_published_seed",)),
    Mutant("noise of a large sum in one piece", "27", "privacy/noise.py", "BLOCK = 1 << 18", "BLOCK = 1 << 30",
           (NOISE + "a_large_sum_is_not_copied",)),
    Mutant("float32 noise on a float64 sum", "27 36", "privacy/noise.py",
           "dtype: Any = np.float64 if total.dtype == torch.float64 else np.float32", "dtype: Any = np.float32",
           (NOISE + "noise_is_as_fine_as_the_sum",)),
    Mutant("weights told apart by their mean", "35", "privacy/noise.py", "value.detach()", "value.detach().mean(0)",
           (NOISE + "fingerprint_tells_weights_apart",)),
]  # fmt: skip

STREAM_MESSAGE, ONLY_STREAMS = (
    "[purpose, release, digest, name]",
    (STREAMS + "streams_differ_by_everything_that_names_them",),
)
STREAM_MUTANTS = [
    Mutant("seed by 32 bits", "36", "privacy/streams.py", '"sha256")[:16]', '"sha256")[:4]',
           (STREAMS + "128_bits_reach_the_generator",)),
    Mutant("seed by the low 64 bits", "36", "privacy/streams.py", '"sha256")[:16]', '"sha256")[:8]',
           (STREAMS + "128_bits_reach_the_generator",)),
    Mutant("purpose left out of the stream key", "36", "privacy/streams.py", STREAM_MESSAGE, "[release, digest, name]",
           ONLY_STREAMS),
    Mutant("release left out of the stream key", "36", "privacy/streams.py", STREAM_MESSAGE, "[purpose, digest, name]",
           (*ONLY_STREAMS, SAMPLING + "draws_are_independent_of_earlier_draws[1]")),
    Mutant("digest left out of the stream key", "35 36", "privacy/streams.py", STREAM_MESSAGE, "[purpose, release, name]",
           (*ONLY_STREAMS, NOISE + "runs_that_differ_only_in_epsilon_share_neither_draw_nor_noise")),
    Mutant("tensor left out of the stream key", "36", "privacy/streams.py", STREAM_MESSAGE, "[purpose, release, digest]",
           ONLY_STREAMS),
    Mutant("names run together in the stream key", "36", "privacy/streams.py", f"json.dumps({STREAM_MESSAGE})",
           'f"{purpose}{release}{digest}{name}"', (STREAMS + "names_of_streams_cannot_be_confused",)),
    Mutant("blocks overlap", "36", "privacy/streams.py", "block << 192", "block << 4", (STREAMS + "blocks_do_not_overlap",)),
    Mutant("run key from a seeded generator", "36", "privacy/streams.py", "cls(secrets.token_bytes(KEY_BYTES))",
           "cls(np.random.bytes(KEY_BYTES))", (STREAMS + "fresh_keys_come_from_the_operating_system",)),
    Mutant("test key passed off as a secret one", "36", "privacy/streams.py", ".digest(), is_test_key=True)", ".digest())",
           (STREAMS + "only_a_test_key_says_so",)),
    Mutant("key shown by repr", "36", "privacy/streams.py", "RunKey(<secret>,", "RunKey({self._secret.hex()} <secret>,",
           (STREAMS + "the_secret_is_never_shown",)),
    Mutant("key file for everybody", "36", "privacy/streams.py", "0o600)", "0o644)",
           (STREAMS + "key_file_is_for_its_owner_alone",)),
    Mutant("key file overwritten", "36", "privacy/streams.py", "os.O_CREAT | os.O_EXCL", "os.O_CREAT",
           (STREAMS + "key_file_is_never_overwritten",)),
]  # fmt: skip

DRAW = "np.flatnonzero(uniform < self.plan.at(release).sample_rate)"
UNIFORM = 'uniform = self.key.stream("sampling", release, self.digest).random(self.plan.num_examples)'
SHUFFLE = """order = self.key.stream("sampling", 0, self.digest).permutation(self.plan.num_examples)
        size = self.plan.at(release).batch_size
        return np.sort(np.take(order, range(release * size, (release + 1) * size), mode="wrap"))"""
RUN_OF_ROWS = """stream = self.key.stream("sampling", release, self.digest)
        size = stream.binomial(self.plan.num_examples, self.plan.at(release).sample_rate)
        first = stream.integers(self.plan.num_examples)
        return np.sort(np.arange(first, first + size) % self.plan.num_examples)"""
SAMPLING_MUTANTS = [
    Mutant("fixed-size choice instead of Poisson", "1 2", "privacy/sampling.py", DRAW,
           "np.sort(np.argsort(uniform)[: self.plan.at(release).batch_size])",
           (SAMPLING + "examples_are_drawn_independently_of_each_other", SAMPLING + "batch_size_is_binomial")),
    Mutant("shuffle instead of Poisson", "1", "privacy/sampling.py", f"{UNIFORM}\n        return {DRAW}", SHUFFLE,
           (SAMPLING + "draws_are_independent_of_earlier_draws[1]", SAMPLING + "batch_size_is_binomial")),
    Mutant("binomial size, then a run of rows", "2", "privacy/sampling.py", f"{UNIFORM}\n        return {DRAW}", RUN_OF_ROWS,
           (SAMPLING + "examples_are_drawn_independently_of_each_other",)),
    Mutant("rate of another plan", "1", "privacy/sampling.py", ".sample_rate)", ".sample_rate * 1.1)",
           (SAMPLING + "every_example_takes_part_at_rate_q",)),
    Mutant("rate of the first phase throughout", "1", "privacy/sampling.py", DRAW, DRAW.replace("at(release)", "at(0)"),
           (SAMPLING + "rate_follows_the_phase",)),
    Mutant("one draw for all releases", "1 36", "privacy/sampling.py", UNIFORM, UNIFORM.replace("release", "0"),
           (SAMPLING + "draws_are_independent_of_earlier_draws[1]",)),
    Mutant("draws not keyed by the configuration", "36", "privacy/sampling.py", UNIFORM,
           UNIFORM.replace("self.digest", '""'),
           (SAMPLING + "a_draw_is_the_same_each_time_and_hangs_on_key_release_and_digest",)),
    Mutant("draws from the stream of the noise", "36", "privacy/sampling.py", UNIFORM, UNIFORM.replace("sampling", "noise"),
           (SAMPLING + "noise_and_draws_have_streams_of_their_own",)),
    Mutant("ragged micro-batch dropped", "24", "privacy/sampling.py",
           "        if part:\n            yield part\n", "",
           (SAMPLING + "a_logical_batch_holds_the_whole_draw_once[3]",)),
    Mutant("last release dropped", "24", "privacy/sampling.py", "range(self.start, self.steps)",
           "range(self.start, self.steps - 1)", (RELEASE + "steps_draws_and_account_agree_at_exit[0.3-2]",)),
    Mutant("plan for another number of rows", "1", "privacy/sampling.py", "if units != draws.plan.num_examples:",
           "if False:",
           (SAMPLING + "plan_for_another_number_of_rows_is_refused",)),
]  # fmt: skip

RELEASE_CALL = "self.mechanism.release(sums, batch.release, self.weights, self.parts(batch.release))"
UPDATE_CALL = "self.update(sums, setting)"
REPLACE = '__import__("dataclasses").replace('
NOISE_ON_MEAN = f"""for total in sums.values():
            total.div_(setting.batch_size)
        {RELEASE_CALL}
        self.update(sums, replace(setting, batch_size=1))""".replace("replace(", REPLACE)
ADDED = "losses.append(found.losses)"
ROWS = "sum(len(next(iter(m.values()))) for m in batch.micro_batches)"
REALISED = f"self.update(sums, {REPLACE}setting, batch_size=max(1, {ROWS})))"
SCHEDULED = "self.lr_schedulers().step()  # type: ignore[union-attr]"
RELEASE_MUTANTS = [
    Mutant("noise for the sum added to the mean", "6", "methods/base.py", f"{RELEASE_CALL}\n        {UPDATE_CALL}",
           NOISE_ON_MEAN, (RELEASE + "noise_of_the_update",)),
    Mutant("noise per micro-batch", "11", "methods/first_order.py", ADDED,
           f"{ADDED}\n            {RELEASE_CALL}", (RELEASE + "micro_batches_make_one_release",)),
    Mutant("no release at all", "6", "methods/base.py", RELEASE_CALL, "self.mechanism.draws += 1", SIZE_OF_NOISE[1:]),
    Mutant("divide by the realised batch", "3", "methods/base.py", UPDATE_CALL, REALISED,
           (RELEASE + "mean_divides_by_the_expected_batch_size",)),
    Mutant("divisor from N", "4", "methods/base.py", UPDATE_CALL,
           f"self.update(sums, {REPLACE}setting, batch_size=self.mechanism.plan.num_examples // self.mechanism.plan.steps))",
           (RELEASE + "divisor_does_not_depend_on_the_number_of_examples[97]",)),
    Mutant("skip empty batches", "19", "methods/base.py", "sums = that_fits(self.query, batch,",
           "if not batch.micro_batches:\n            return\n        sums = that_fits(self.query, batch,",
           (RELEASE + "empty_draws_release_noise_and_are_paid_for",)),
    Mutant("no noise on empty batches", "19", "methods/base.py", RELEASE_CALL,
           "self.mechanism.release(sums if batch.micro_batches else {}, batch.release, self.weights)",
           (RELEASE + "empty_draws_release_noise_and_are_paid_for",)),
    Mutant("noise keyed by weights of long ago", "35", "methods/base.py",
           f"{SCHEDULED}\n        self.weights = self._fingerprint()", SCHEDULED,
           (RELEASE + "noise_is_keyed_by_the_weights_that_the_sum_was_taken_at",)),
]  # fmt: skip

STEPS = "math.ceil(Fraction(str(phase.epochs)) * self.num_examples / phase.batch_size)"
ROUNDED_UP = "steps_are_rounded_up_exactly"
LOSS = """return privacy_loss_distribution.from_gaussian_mechanism(
        release.noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=release.sample_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )"""
ONE_RELATION = (ACCOUNTING + "a_sampled_release_matches_the_closed_form[0.1-0.7-1e-05]",)
BELIEVED = "isinstance(remembered, float) and _holds(excess, remembered)"
ACCOUNT_MUTANTS = [
    Mutant("steps rounded down", "24", "privacy/plan.py", STEPS, STEPS.replace("ceil", "floor"),
           (f"{PLAN}{ROUNDED_UP}[67349-1000-3-203]",)),
    Mutant("steps rounded to the nearest", "24", "privacy/plan.py", STEPS, STEPS.replace("math.ceil", "round"),
           (f"{PLAN}{ROUNDED_UP}[67349-1000-3-203]",)),
    Mutant("steps in floating point", "24", "privacy/plan.py", "Fraction(str(phase.epochs))", "phase.epochs",
           (PLAN + ROUNDED_UP,)),
    Mutant("steps of epochs as a binary fraction", "24", "privacy/plan.py", "Fraction(str(phase.epochs))",
           "Fraction(phase.epochs)", (f"{PLAN}{ROUNDED_UP}[10-1-0.1-1]",)),
    Mutant("delta check dropped", "21", "privacy/plan.py", "if not 0 < self.delta < 1 / self.num_examples:",
           "if not 0 < self.delta < 1:", (PLAN + "careless_delta_is_refused",)),
    Mutant("default delta of 1/N", "21", "privacy/plan.py", "Fraction(1, 2 * num_examples)", "Fraction(1, num_examples)",
           (PLAN + "default_delta_is_never_rounded_up",)),
    Mutant("default delta rounded to the nearest", "21", "privacy/plan.py", "math.floor(exact / Fraction(10) ** exponent)",
           "round(exact / Fraction(10) ** exponent)", (PLAN + "default_delta_is_never_rounded_up",)),
    Mutant("plan gives numbers for any release", "24", "privacy/plan.py",
           "if first <= release < first + steps:", "if first <= release:",
           (PLAN + "release_after_the_last_does_not_exist", CALLBACK + "no_release_beyond_the_plan")),
    Mutant("plan can be changed", "1", "privacy/plan.py", "@dataclass(frozen=True)\nclass PrivacyPlan:",
           "@dataclass\nclass PrivacyPlan:", (PLAN + "plan_is_frozen[epsilon]",)),
    Mutant("only the first phase is paid for", "39", "privacy/plan.py",
           "for phase in phases:\n            taken = min(left, self.steps_of(phase))",
           "for phase in phases[:1]:\n            taken = min(left, self.steps_of(phase))",
           (PLAN + "phases_are_composed_in_one_account", PLAN + "calibration_covers_all_phases")),
    Mutant("accountant for adding an example only", "20", "privacy/accounting.py", LOSS,
           f"made = {LOSS.removeprefix('return ')}\n    return PrivacyLossDistribution(made._pmf_add)", ONE_RELATION),
    Mutant("accountant for replacing an example", "20", "privacy/accounting.py", "ADD_OR_REMOVE_ONE", "REPLACE_ONE",
           ONE_RELATION),
    Mutant("sampling left out of the account", "39", "privacy/accounting.py", "sampling_prob=release.sample_rate,",
           "sampling_prob=1.0,", ONE_RELATION),
    Mutant("optimistic account", "39", "privacy/accounting.py", "value_discretization_interval=grid,\n",
           "value_discretization_interval=grid, pessimistic_estimate=False,\n",
           (ACCOUNTING + "whole_batch_releases_match_the_closed_form[4.0-9-1e-05]",)),
    Mutant("each kind of release counted once", "39", "privacy/accounting.py", ".self_compose(count)", "",
           (ACCOUNTING + "whole_batch_releases_match_the_closed_form[4.0-9-1e-05]",)),
    Mutant("the worst kind of release instead of all", "39", "privacy/accounting.py",
           "reduce(PrivacyLossDistribution.compose, composed)", "composed[0]",
           (ACCOUNTING + "equals_dp_accounting_on_its_own_events",)),
    Mutant("cache believed", "39", "privacy/accounting.py", BELIEVED, "isinstance(remembered, float)",
           (ACCOUNTING + "poisoned_cache_is_not_used",)),
    Mutant("cache believed if it is safe", "39", "privacy/accounting.py", "and -0.01 < excess(math.log(noise)) <= 0",
           "and excess(math.log(noise)) <= 0", (ACCOUNTING + "poisoned_cache_is_not_used",)),
    Mutant("epsilon left out of the cache key", "39", "privacy/accounting.py", "[public, epsilon, delta,", "[public, delta,",
           (ACCOUNTING + "a_cache_for_other_numbers_is_not_used",)),
    Mutant("calibrated to waste noise", "39", "privacy/accounting.py", "* (1 + 1e-4)", "* 1.02",
           (ACCOUNTING + "calibrated_noise_is_the_smallest",)),
    Mutant("calibrated to too little noise", "39", "privacy/accounting.py",
           "* (1 + 1e-4)\n    while excess(math.log(noise)) > 0:", "* 0.99\n    while False:",
           (ACCOUNTING + "calibrated_noise_is_the_smallest",)),
]  # fmt: skip

CHARGE = "self.left -= self.ledger.charge(entry)"
CHARGE_LATER = """made = pl_module.training_step
            pl_module.training_step = lambda *given: (setattr(pl_module, "training_step", made), made(*given),
                                                      self.ledger.charge(entry))[1]
            self.left -= 1"""
CHECKED = "_refuse_loader(trainer.train_dataloader, plan, digest, mechanism, ranks)"
TOGETHER = "if holder.plan is not plan or holder.digest != digest:"
FOREIGN = CALLBACK + "every_loader_but_ours_is_refused"
CALLBACK_MUTANTS = [
    Mutant("charged after the release", "35", "privacy/callback.py", CHARGE, CHARGE_LATER,
           (CALLBACK + "a_release_is_paid_for_on_disk_before_it_is_made",)),
    Mutant("not charged at all", "24 35", "privacy/callback.py", CHARGE, "self.left -= 1",
           (CALLBACK + "a_release_is_paid_for_on_disk_before_it_is_made", RELEASE + "micro_batches_make_one_release")),
    Mutant("loader check dropped", "1 25", "privacy/callback.py", f"    {CHECKED}\n", "",
           (f"{FOREIGN}[shuffled]", f"{FOREIGN}[draws_of_another_plan]")),
    Mutant("any order of releases accepted", "25", "privacy/callback.py", "not isinstance(order, ReleaseOrder)", "False",
           (f"{FOREIGN}[weighted_draws]",)),
    Mutant("any data set accepted", "25", "privacy/callback.py", "if not isinstance(batches, PoissonBatches) or", "if",
           (f"{FOREIGN}[other_rows_in_our_order]",)),
    Mutant("several draws in one batch accepted", "25", "privacy/callback.py", " or loader.batch_size is not None:", ":",
           (f"{FOREIGN}[several_draws_in_one]",)),
    Mutant("sampler of another plan accepted", "1", "privacy/callback.py", '("sampler", batches.draws)',
           '("sampler", mechanism)', (f"{FOREIGN}[draws_of_another_plan]",)),
    Mutant("noise of another plan accepted", "1", "privacy/callback.py", ', ("noise", mechanism))', ",)",
           (CALLBACK + "noise_of_another_plan_is_refused[plan]", CALLBACK + "noise_of_another_plan_is_refused[digest]")),
    Mutant("plans not compared", "1", "privacy/callback.py", TOGETHER, "if holder.digest != digest:",
           (f"{FOREIGN}[draws_of_another_plan]",)),
    Mutant("digests not compared", "35", "privacy/callback.py", TOGETHER, "if holder.plan is not plan:",
           (f"{FOREIGN}[draws_of_another_digest]",)),
    Mutant("GradScaler accepted", "10", "privacy/callback.py", 'getattr(trainer.precision_plugin, "scaler", None)', "None",
           (CALLBACK + "grad_scaler_is_refused",)),
    Mutant("one batch taken for all", "24", "privacy/callback.py", '(str(trainer.limit_train_batches), "1.0"',
           "(trainer.limit_train_batches, 1.0",
           (CALLBACK + "trainer_settings_that_break_the_account_are_refused[{'limit_train_batches': 1}]",)),
    Mutant("steps not compared with releases", "24", "privacy/callback.py",
           "trainer.global_step != batch.release + 1 or ", "",
           (CALLBACK + "steps_and_noise_draws_must_agree_after_every_release",)),
    Mutant("noise draws not counted", "10", "privacy/callback.py",
           " or _private(pl_module).mechanism.draws != self._made:", ":",
           (CALLBACK + "steps_and_noise_draws_must_agree_after_every_release",)),
    Mutant("ledger not compared at the end", "24", "privacy/callback.py",
           "if len({e.release for e in self.ledger.entries}) < trainer.global_step:", "if False:",
           (CALLBACK + "uncharged_releases_are_noticed",)),
    Mutant("tensors that never move go unnoticed", "16", "privacy/callback.py", "        if still:", "        if False:",
           (CALLBACK + "tensor_that_never_moves_is_reported",)),
    Mutant("lost releases are free", "35", "privacy/callback.py",
           "counts = Counter(dict(ledger.releases()))\n        counts.update",
           "counts = Counter()\n        counts.update",
           (AFFORDABLE + "releases_of_another_configuration_are_paid_for_too",)),
    Mutant("the curve forgets what was paid twice", "35 39", "curves.py", ", *self.paid_twice]", "]",
           (CURVES + "it_never_understates[3-a dear phase first]", CURVES + "it_never_understates[3-one phase]")),
    Mutant("releases paid twice stand for later ones", "35 39", "curves.py",
           "[*self.plan.releases(count), *self.paid_twice]",
           "self.plan.releases(min(self.plan.steps, count + sum(n for _, n in self.paid_twice)))",
           (CURVES + "it_never_understates[3-a dear phase first]",)),
    Mutant("a release's own time", "34", "curves.py", 'float(f"{speed:.2g}")', "speed",
           ("tests/methods/test_first_order.py::test_the_speed_of_a_curve_has_two_digits",)),
    Mutant("a release that is made again is paid twice", "35", "privacy/callback.py",
           "if entry.digest == digest}", "if False}",
           (AFFORDABLE + "releases_paid_for_are_not_paid_again",)),
]  # fmt: skip

ENGINE_MUTANTS = runpy.run_path(str(Path(__file__).with_name("engine_mutants.py")))["ENGINE_MUTANTS"]
CLIPPING_MUTANTS = runpy.run_path(str(Path(__file__).with_name("clipping_mutants.py")))["CLIPPING_MUTANTS"]
ZOO_MUTANTS = runpy.run_path(str(Path(__file__).with_name("zoo_mutants.py")))["ZOO_MUTANTS"]
DROPOUT_MUTANTS = runpy.run_path(str(Path(__file__).with_name("dropout_mutants.py")))["DROPOUT_MUTANTS"]
RANKS_MUTANTS = runpy.run_path(str(Path(__file__).with_name("ranks_mutants.py")))["RANKS_MUTANTS"]
TASK_MUTANTS = runpy.run_path(str(Path(__file__).with_name("task_mutants.py")))["TASK_MUTANTS"]
ZEROTH_ORDER_MUTANTS = runpy.run_path(str(Path(__file__).with_name("zeroth_order_mutants.py")))["ZEROTH_ORDER_MUTANTS"]
MUTANTS = [
    *NOISE_MUTANTS, *STREAM_MUTANTS, *SAMPLING_MUTANTS, *RELEASE_MUTANTS, *ACCOUNT_MUTANTS, *CALLBACK_MUTANTS,
    *(Mutant(*fields) for fields in [
        *ENGINE_MUTANTS, *ZOO_MUTANTS, *CLIPPING_MUTANTS, *DROPOUT_MUTANTS, *ZEROTH_ORDER_MUTANTS, *TASK_MUTANTS,
        *RANKS_MUTANTS,
    ]),
]  # fmt: skip
