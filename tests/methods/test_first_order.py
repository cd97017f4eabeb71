"""One release, as a first-order method makes it, through a real Trainer and private_loader."""

import csv
import math

import pytest
import torch
from lightning.pytorch import Callback

from privzoo.curves import Curves, EpsilonCurve
from privzoo.errors import RunLost, UserError
from privzoo.methods.base import Interrupted
from privzoo.privacy.noise import NoiseMechanism, fingerprint
from privzoo.privacy.sampling import LogicalBatch
from privzoo.privacy.streams import RunKey
from privzoo.run_loggers import build_loggers

SGD = torch.optim.SGD


def length(sums):
    return torch.sqrt(sum(value.square().sum() for value in sums.values())).item()


def test_biases_trains_biases_and_head_and_nothing_else(make_run, plans):
    """PRIVACY line 16: over five private releases each bias and the head moved; every other tensor, buffers included, is
    bit-equal. The pooler's bias counts; LayerNorm's weight does not."""
    run = make_run(plans(), "biases")
    before = {name: value.clone() for name, value in run.method.model.state_dict().items()}
    run.fit()
    after = run.method.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("bias")} | {"classifier.weight"}
    assert len(moved) == 20  # embeddings 1, two layers of 8 each, pooler 1, head 2
    assert all(torch.isfinite(value).all() for value in after.values())


def test_all_trains_every_tensor(make_run, plans):
    """PRIVACY line 16: dp_full moves every parameter."""
    run = make_run(plans(), "all")
    before = {name: p.detach().clone() for name, p in run.method.model.named_parameters()}
    run.fit()
    assert [name for name, p in run.method.model.named_parameters() if torch.equal(p, before[name])] == []


def test_micro_batches_do_not_change_a_release(make_run, plans):
    """PRIVACY line 11: sizes 1, 3 and 100 give one result to 1e-10, with exactly one noise draw a release."""
    plan, found = plans(batch_size=20, epochs=0.5), {}
    for size in (1, 3, 100):
        run = make_run(plan, microbatch_size=size, optimizer=SGD, lr=1.0)
        run.fit()
        assert plan.steps == 1
        assert run.method.mechanism.draws == 1
        assert max(run.recorder.sizes[0]) == min(size, sum(run.recorder.sizes[0]))
        found[size] = run.recorder.weights[0]
    assert len(run.recorder.sizes[0]) == 1
    torch.testing.assert_close(found[1], found[100], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[3], found[100], rtol=0, atol=1e-10)


def test_one_noise_draw_a_release(make_run, plans):
    """PRIVACY lines 11 and 24: draws = optimizer steps = releases of the plan, whatever the micro-batches."""
    plan = plans()
    run = make_run(plan, microbatch_size=2)
    trainer = run.fit()
    assert run.method.mechanism.draws == trainer.global_step == plan.steps == 5
    assert sum(len(sizes) for sizes in run.recorder.sizes) > 5


def test_a_release_is_clipped_sum_plus_noise_over_b(make_run, plans):
    """PRIVACY lines 3, 5 and 6: with SGD at lr 1 the weights move by -(clipped sum + noise) / B, where the noise is that
    of a mechanism of our own and the sum is the engine's over the drawn rows one by one."""
    plan = plans(epochs=0.2)
    run = make_run(plan, optimizer=SGD, lr=1.0, schedule="constant")
    model, task = run.method.model, run.method.task
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    sums = {name: torch.zeros_like(p) for name, p in before.items()}
    for index in run.draws(0):
        loss = task.losses(model, task.collate([run.batches.rows[int(index)]])).sum()
        own = dict(zip(before, torch.autograd.grad(loss, list(run.method.trainable.values())), strict=True))
        for name, value in own.items():
            sums[name] += value * min(1.0, 0.5 / length(own))
    mechanism = NoiseMechanism(plan, RunKey.for_tests(0), "digest")
    mechanism.release(sums, 0, fingerprint(run.method.trainable.items()))
    run.fit()
    assert len(run.draws(0)) not in (0, 8)  # so that B and the realised size differ
    for name, value in run.recorder.weights[0].items():
        torch.testing.assert_close(before[name] - value, sums[name] / 8, rtol=0, atol=1e-10)


def test_an_empty_draw_releases_noise(make_run, plans):
    """PRIVACY line 19: no micro-batch, a noise draw, a step: weights move by exactly the noise over B."""
    plan = plans(batch_size=1, epochs=0.025)
    seed = next(s for s in range(100) if len(make_run(plan, seed=s).draws(0)) == 0)
    run = make_run(plan, seed=seed, optimizer=SGD, lr=1.0)
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    trainer = run.fit()
    assert run.recorder.sizes == [[]]
    assert trainer.global_step == run.method.mechanism.draws == 1
    moves = torch.cat([(before[name] - value).flatten() for name, value in run.recorder.weights[0].items()])
    assert (moves != 0).all()
    assert 0.45 < moves.std() < 0.55  # sigma C / B = 0.5 over some 1,900 coordinates
    assert run.method.private_metrics == {}


@pytest.mark.parametrize("microbatch_size", [1, 4, 100])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_example_in_a_release(poison, microbatch_size, make_run, plans):
    """PRIVACY line 9: the sum is that of the others, the release is noisy, counted and finite."""
    plan = plans(epochs=0.2)
    clean = make_run(plan, microbatch_size=microbatch_size)
    drawn = [int(i) for i in clean.draws(0)]
    assert len(drawn) > 2
    rows = list(clean.batches.rows)
    rows[drawn[1]] = {**rows[drawn[1]], "strength": poison}
    run = make_run(plan, microbatch_size=microbatch_size, rows=rows)
    run.method.weights = "some"
    found = run.method.query(run.batches[0])
    others = [clean.batches.rows[i] for i in drawn if i != drawn[1]]
    expected = clean.method.query(LogicalBatch(0, tuple(clean.method.task.collate([row]) for row in others)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    released = {name: value.clone() for name, value in found.items()}
    run.method.mechanism.release(released, 0, "some")
    assert run.method.mechanism.draws == 1
    for name, value in released.items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, found[name])
    trainer = run.fit()
    assert trainer.global_step == 1
    assert all(torch.isfinite(p).all() for p in run.method.model.parameters())


def test_sum_of_a_query_is_within_n_times_c(make_run, plans):
    """PRIVACY line 5: rows of any strength; one more or less moves the sum by at most C, and by more than nothing."""
    plan = plans()
    run = make_run(plan)
    task = run.method.task
    rows = [{**row, "strength": 10.0 ** (i % 9 - 4)} for i, row in enumerate(run.batches.rows)]
    whole = run.method.query(LogicalBatch(0, (task.collate(rows[:12]), task.collate(rows[12:20]))))
    for left_out in (0, 4, 8, 13):
        rest = [row for i, row in enumerate(rows[:20]) if i != left_out]
        without = run.method.query(LogicalBatch(0, (task.collate(rest),)))
        moved = length({name: whole[name] - without[name] for name in whole})
        assert 0 < moved <= 0.5 * (1 + 1e-6)


def test_private_numbers_are_named_so(make_run, plans):
    """PRIVACY line 34: the one name under which the batch's own numbers may be logged, and by which loggers drop them."""
    run = make_run(plans())
    run.fit()
    assert run.method.private_metrics
    assert all(name.startswith("private/") for name in run.method.private_metrics)


def test_private_loss_is_the_mean_over_the_rows(make_run, plans):
    """Over rows, not over micro-batches of different sizes."""
    run = make_run(plans())
    run.batches.microbatch_size = len(run.draws(0)) - 1
    batch = run.batches[0]
    assert [len(micro_batch["labels"]) for micro_batch in batch.micro_batches] == [run.batches.microbatch_size, 1]
    task, model = run.method.task, run.method.model
    losses = torch.cat([task.losses(model, micro_batch) for micro_batch in batch.micro_batches])
    run.method.query(batch)
    assert run.method.private_metrics["private/loss"] == pytest.approx(losses.mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),  # two of four releases rise
        ("linear", 0.3, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),  # 1.2 releases, rounded up
        ("constant", 0.0, [1.0] * 5),
        ("constant", 0.25, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_by_hand(schedule, warmup, factors, make_run, plans):
    """Four releases; the fifth value is what is left after the last."""
    run = make_run(plans(batch_size=10, private=False), schedule=schedule, warmup=warmup)
    assert [run.method.lr.at(release) / run.method.lr.highest[0] for release in range(5)] == pytest.approx(factors)


def test_learning_rate_that_the_optimizer_gets(make_run, plans):
    """The schedule counts releases: of B / N = 1/4, four of them, at lr 0.8."""
    run = make_run(plans(batch_size=10, private=False), lr=0.8)
    seen = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    run.method.make_optimizer = Recording
    run.fit()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_the_head_learns_at_a_rate_of_its_own(make_run, plans):
    """SGD without noise, so that a step is lr times the gradient: the head's is ten times as long, the body's the same;
    both follow the schedule."""
    moved = {}
    for factor in (1.0, 10.0):
        run = make_run(plans(batch_size=20, private=False), optimizer=SGD, lr=1e-6, head_lr_factor=factor)
        before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
        run.fit()
        moved[factor] = {name: value - before[name] for name, value in run.recorder.weights[1].items()}
        assert [group["lr"] for group in run.method.optimizers().param_groups] == [0.0, 0.0]
    for name, value in moved[1.0].items():
        times = 10 if name.startswith("classifier") else 1
        torch.testing.assert_close(moved[10.0][name], times * value, rtol=1e-3, atol=1e-12)


def test_a_model_without_a_new_head_has_one_rate(make_run, plans):
    run = make_run(plans(private=False), new_head=(), head_lr_factor=10.0, lr=0.5, optimizer=SGD)
    assert [group["lr"] for group in run.method.configure_optimizers()["optimizer"].param_groups] == [0.5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head_lr_factor": 0.0}, "head_lr_factor=0.0 to be a number above 0"),
        ({"head_lr_factor": None}, "head_lr_factor=None to be a number above 0"),
        ({"warmup": "some"}, r"0 <= method\.warmup=some < 1"),
        ({"head_lr_factor": math.inf}, "head_lr_factor=inf to be a number above 0"),
        ({"schedule": "cosine"}, "schedule=cosine to be linear or constant"),
        ({"warmup": 1.0}, r"0 <= method\.warmup=1\.0 < 1"),
        ({"warmup": -0.1}, r"0 <= method\.warmup=-0\.1 < 1"),
    ],
)
def test_options_out_of_range(options, sentence, make_run, plans):
    with pytest.raises(UserError, match=sentence):
        make_run(plans(), **options)


def test_a_checkpoint_holds_the_trained_part_alone(make_run, plans, tmp_path):
    """Biases and head, no copy of the base model, and nothing of the data."""
    run = make_run(plans(epochs=0.2), "biases")
    trainer = run.fit()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    saved = checkpoint["state_dict"]
    assert saved.keys() == {f"model.{name}" for name in run.method.trainable}
    for name, parameter in run.method.trainable.items():
        assert torch.equal(saved[f"model.{name}"], parameter)
    run.method.on_load_checkpoint(checkpoint)
    missing = dict(list(saved.items())[1:])
    for wrong in (missing, {**saved, "model.more": torch.zeros(1)}):
        with pytest.raises(UserError, match="resume with the run's own configuration"):
            run.method.on_load_checkpoint({**checkpoint, "state_dict": wrong})
    (state,) = checkpoint["optimizer_states"]
    one_group = {**state, "param_groups": [{**state["param_groups"][0], "params": list(range(len(saved)))}]}
    with pytest.raises(UserError, match="other groups of parameters"):
        run.method.on_load_checkpoint({**checkpoint, "optimizer_states": [one_group]})


def test_a_stop_comes_between_micro_batches_and_before_noise(make_run, plans):
    """The third micro-batch is not looked at; no noise is drawn; weights and optimizer are as they were."""
    run = make_run(plans(batch_size=20, epochs=0.5), microbatch_size=2)
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    losses, calls = run.method.task.losses, []

    def stopping(model, batch):
        calls.append(1)
        run.method.stop_requested = len(calls) == 2
        return losses(model, batch)

    run.method.task.losses = stopping
    assert len(run.batches[0].micro_batches) > 3
    with pytest.raises(Interrupted):
        run.fit()
    assert len(calls) == 2
    assert run.method.mechanism.draws == 0
    assert all(torch.equal(p, before[name]) for name, p in run.method.trainable.items())


def test_a_row_has_one_loss(make_run, plans):
    """PRIVACY line 5: a task that makes two windows of a row and forgets to say so would clip each on its own; counted in
    every release, as long rows may be rare."""
    run = make_run(plans())
    collate = run.method.task.collate
    run.batches.collate = lambda rows: collate([*rows, rows[0]])
    with pytest.raises(UserError, match=r"Expected a loss for each of (\d+) rows, found shape \(\d+,\)"):
        run.method.query(run.batches[0])


def test_the_speed_of_a_curve_has_two_digits(make_run, plans, tmp_path):
    """PRIVACY line 34: a release's own time would tell how many rows were drawn."""

    class Logged(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.loggers = build_loggers(tmp_path, {})

    plan = plans()
    make_run(plan).fit(callbacks=[Logged(), Curves(EpsilonCurve(plan))])
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        speeds = [row["examples_per_s"] for row in csv.DictReader(stream)]
    assert len(speeds) == plan.steps
    assert [float(speed) for speed in speeds] == [float(f"{float(speed):.2g}") for speed in speeds]


# ---- memory


def test_a_draw_that_does_not_fit_is_treated_again_in_smaller_parts(make_run, plans, hungry):
    """PRIVACY 18 and 35: the same draw, nothing of the first trial in its sum, one entry and one noise a release."""
    large, frugal = make_run(plans(), microbatch_size=7, task=hungry(2)), make_run(plans(), microbatch_size=2)
    large.fit()
    frugal.fit()
    assert large.batches.microbatch_size == 2
    assert large.method.mechanism.draws == frugal.method.mechanism.draws == 5
    for name, value in frugal.recorder.weights[-1].items():
        torch.testing.assert_close(large.recorder.weights[-1][name], value, rtol=1e-9, atol=1e-12)


def test_displaced_weights_are_not_asked_again(make_walk, plans, hungry):
    """PRIVACY 32: memory may run out while weights are moved, and another way there and back rounds: the run ends."""
    run = make_walk(plans(), microbatch_size=7, task=hungry(2))
    with pytest.raises(RunLost, match="Memory ran out"):
        run.fit()
    assert run.method.mechanism.draws == 0


def test_a_row_that_does_not_fit_ends_the_run_with_a_way_out(make_run, plans, hungry):
    run = make_run(plans(), microbatch_size=4, task=hungry(0))
    with pytest.raises(RunLost, match="resume=<run folder> and a smaller microbatch_size"):
        run.fit()
    assert run.method.mechanism.draws == 0
