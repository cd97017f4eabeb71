"""A run over two real processes: the same draw, the same noise, the same weights as of one process (PRIVACY 17 and 18)."""

import fcntl
import itertools
import os
from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig

from privzoo.errors import UserError
from privzoo.methods.base import Interrupted
from privzoo.methods.dealing import close_layouts, put_in_place
from privzoo.methods.directions import SeededSGD
from privzoo.methods.zeroth_order import ZerothOrder
from privzoo.models.adapters import wrap
from privzoo.models.checkpointing import turn_on_checkpointing
from privzoo.models.quantization import keep_quantized_weights
from privzoo.privacy.clipping import GhostTwoPass, Loop
from privzoo.privacy.clipping.adaptive import AdaptiveClip
from privzoo.privacy.plan import Phase, PrivacyPlan
from privzoo.privacy.ranks import ALONE, Ranks
from privzoo.privacy.strategies import Dealer

ROWS = [{"ids": [2, 3 + i, 4][: 2 + i % 2], "label": i % 3} for i in range(4)]
NOTHING = [{"ids": [2, 3, 4], "label": 0, "strength": 0.0}] * 40  # a loss that is 0 whatever the weights
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}  # peft's are float32
WALK = {"kind": ZerothOrder, "optimizer": SeededSGD}
TUNER = partial(LoraConfig, r=2, lora_alpha=4)


def wrap_in_4_bits(model, new_head):
    """The adapter of a base in float32 whose body's linear layers are in 4 bits; they compute in float32, as rounding would
    hide mistakes."""
    for parent in list(model.float().bert.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                shape = (layer.in_features, layer.out_features)
                made = Linear4bit(*shape, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
                made.load_state_dict(layer.state_dict())
                setattr(parent, name, made.to("cpu"))  # here it is quantised
    model.is_loaded_in_4bit = True
    keep_quantized_weights(model)
    return wrap(model, new_head, tuner=TUNER)


LORA = {"trainable": "adapter", "adapter": partial(wrap, tuner=TUNER)}
BY_ZERO = {
    "zero1": {
        "dp_full": {},
        "loop": {"engine": Loop},
        "phases": {"phases": [{}, {"trainable": "biases"}]},
        "units": {"units": [[2 * i, 2 * i + 1] for i in range(40)]},
    },
    "zero2": {
        "dp_full": {},
        "dp_bitfit": {"trainable": "biases"},
        "dp_lora": LORA,
        "dp_qlora": {"trainable": "adapter", "adapter": wrap_in_4_bits},
        "adaptive": {"adaptive": partial(AdaptiveClip, count_noise=3.0)},
    },
    "zero3": {
        "dp_full": {},
        "dp_full, computed twice": {"checkpointing": True},
        "dp_bitfit": {"trainable": "biases"},
        "dp_lora": LORA,
        "dp_qlora": {"trainable": "adapter", "adapter": wrap_in_4_bits},
        "dpzero": WALK,
        "dpzero of an adapter": {**LORA, **WALK},
    },
}
CASES = {
    "dp_full": {},
    "dp_bitfit": {"trainable": "biases"},
    "dp_head": {"trainable": "head"},
    "dp_lora": LORA,
    "loop": {"engine": Loop},
    "ghost_two_pass": {"engine": GhostTwoPass},
    "adaptive": {"adaptive": partial(AdaptiveClip, count_noise=3.0)},
    "dp_lora, dealt out": {**LORA, "dealt_out": "fsdp"},
    "dp_qlora, dealt out": {"trainable": "adapter", "adapter": wrap_in_4_bits, "dealt_out": "fsdp"},
    "dp_bitfit, dealt out": {"trainable": "biases", "dealt_out": "fsdp"},
    "dp_full, dealt out": {"dealt_out": "fsdp"},
    "dp_full, dealt out, computed twice": {"dealt_out": "fsdp", "checkpointing": True},
    "dpzero, dealt out": {**WALK, "dealt_out": "fsdp"},
    "adaptive, dealt out": {"adaptive": partial(AdaptiveClip, count_noise=3.0), "dealt_out": "fsdp"},
    "dpzero of an adapter, dealt out": {**LORA, **WALK, "dealt_out": "fsdp"},
    **{
        f"{name}, {strategy}": {**options, "dealt_out": strategy}
        for strategy, cases in BY_ZERO.items()
        for name, options in cases.items()
    },
    "dpzero": WALK,
    "dpzero with 3 directions": {**WALK, "directions": 3},
    "units": {"units": [[2 * i, 2 * i + 1] for i in range(40)]},
    "nothing but noise": {"rows": NOTHING, "optimizer": torch.optim.SGD, "lr": 1.0, "schedule": "constant"},
}
OFFLOADED = ("dp_full, zero2", "dp_full, zero3")  # what this can show on a CPU: that sums find their way home
DEALT_OUT = (
    *("dp_bitfit, dealt out", "dp_full, dealt out", "dpzero, dealt out", "dpzero of an adapter, dealt out"),
    *("dp_full, zero1", "dp_full, zero2", "dp_full, zero3", "dp_lora, zero3", "dpzero, zero3"),
)
WITH_NOISE = (
    *("dp_full", "adaptive", "dp_full, dealt out", "dpzero with 3 directions"),
    *("dp_full, zero1", "dp_full, zero2", "dp_full, zero3", "dp_lora, zero3"),
)
SCRIPT = """
import sys, torch
sys.path[:0] = [{folder!r}]
from conftest import run_of
import test_ranks
from privzoo.privacy.ranks import join_ranks, leave_ranks
ranks = join_ranks()
sent = []
def counting(name, call):
    def counted(*arguments, **options):
        value = arguments[-1] if arguments else options["tensor"]
        sent.append((name, value.numel() * value.element_size()))
        return call(*arguments, **options)
    return counted
for name in ("all_reduce", "all_gather", "broadcast"):
    setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))
for number in {which}:
    run = test_ranks.made(run_of, *test_ranks.WANTED[number], ranks)
    sent.clear()
    before = run.key_of_weights()
    run.fit()
    keys = [before, run.key_of_weights()]
    torch.save((run.recorder.weights, run.recorder.examples, sent, keys), f"{out}/{{number}}.{{ranks.rank}}")
leave_ranks()
"""


# What both ranks run: a case, whether with noise, and at which batch size.
WANTED = [
    *((case, False, 8) for case in CASES),
    *((case, True, 8) for case in WITH_NOISE),
    ("nothing but noise", True, 1),
    ("dp_full", True, 1),
    *((case, False, 1) for case in DEALT_OUT),
]


def made(run_of, case, noise, batch_size, ranks):
    """A run of one of the cases, in whatever process; `noise=False` leaves out the noise, and nothing else.

    Noise and directions are keyed by the weights, which ranks and one process round otherwise: here by the release alone.
    """
    epochs = 1.0 if batch_size == 8 or case == "nothing but noise" else 0.4
    then = (Phase(batch_size, 0.4, 0.5, 2.0),) if "phases" in CASES[case] else ()
    plan = PrivacyPlan(
        num_examples=40, batch_size=batch_size, epochs=epochs - 0.4 * len(then), delta=1e-3, clip_norm=0.5,
        noise_multiplier=2.0, then=then,
    )  # fmt: skip
    options = {name: value() if name == "adaptive" else value for name, value in CASES[case].items()}
    strategy = options.pop("dealt_out", None)
    checkpointing = options.pop("checkpointing", False)
    run = run_of(plan, ranks=ranks, microbatch_size=3, **options)
    if checkpointing:
        turn_on_checkpointing(getattr(run.method.model, "base_model", run.method.model))
    if strategy and ranks.count > 1:
        device = torch.device("cpu")
        put_in_place(run.method, ROWS[:4], device, Dealer(strategy, device, ranks.count, offload=case in OFFLOADED))
        run.batches.level = run.method.level
    run.recorder.looks = case != "dp_full, zero3"  # such a pass would let go of what the last one has left gathered
    run.key_of_weights, run.method._fingerprint = run.method._fingerprint, lambda: "00" * 32
    if not noise:
        run.method.mechanism._add_noise = lambda *_: None
    return run


@pytest.fixture(scope="module")
def on_two(privzoo, tmp_path_factory, request):
    """`on_two("dp_full", noise, batch_size)`: of both ranks the weights after each release, the drawn examples, and how many
    bytes were handed to which call of torch.distributed."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"  # of all workers, one of which asks
    out.mkdir(exist_ok=True)

    @cache
    def run(which):
        with open(out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / f"{len(which)} of {which[0]}").exists():
                script = SCRIPT.format(folder=str(request.path.parent), out=str(out), which=which)
                code, output = privzoo(script=script, ranks=2)
                assert code == 0, output
                (out / f"{len(which)} of {which[0]}").touch()

    def found(*wanted):
        number = WANTED.index(wanted)
        run((number,) if "PRIVZOO_MUTANT" in os.environ else tuple(range(len(WANTED))))  # what starts once, or is asked once
        return [torch.load(out / f"{number}.{rank}", weights_only=True) for rank in range(2)]

    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, on_two, make_run):
    """Ranks hold the same bits after every release, and to rounding those of one process with the same key."""
    (weights, examples, *_), (others, of_others, *_) = on_two(case, False, 8)
    alone = made(make_run, case, False, 8, ALONE)
    alone.fit()
    assert len(weights) == len(others) == 5
    for release, (mine, yours, expected) in enumerate(zip(weights, others, alone.recorder.weights, strict=True)):
        for name, value in expected.items():
            assert torch.equal(mine[name], yours[name]), (release, name)
            torch.testing.assert_close(mine[name], value, **TOLERANCE[value.dtype])
        shares, whole = (set(examples[release]), set(of_others[release])), set(alone.draws(release).tolist())
        assert not shares[0] & shares[1]
        assert shares[0] | shares[1] == whole, "the shares are one Poisson draw"
        assert abs(len(shares[0]) - len(shares[1])) <= 1


@pytest.mark.parametrize("case", WITH_NOISE)
def test_noise_is_that_of_one_process(case, on_two, make_run):
    """Added once to the total, on every rank alike."""
    (weights, *_), (others, *_) = on_two(case, True, 8)
    alone = made(make_run, case, True, 8, ALONE)
    alone.fit()
    for name, value in alone.recorder.weights[-1].items():
        torch.testing.assert_close(weights[-1][name], value, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(mine[name], yours[name]) for mine, yours in zip(weights, others, strict=True) for name in mine)


def test_noise_is_drawn_once_for_all(on_two):
    """Gradients of 0, by SGD at a rate of 1: what moves the weights is noise alone, of standard deviation sigma C / B."""
    (weights, *_), (others, *_) = on_two("nothing but noise", True, 1)
    moves = [b[name] - a[name] for a, b in itertools.pairwise(weights) for name in a]
    drawn = torch.cat([move.flatten() for move in moves])
    assert len(drawn) > 40_000
    assert float(drawn.std()) == pytest.approx(2.0 * 0.5 / 1, rel=0.02)
    assert abs(float(drawn.mean())) < 0.02
    assert all(torch.equal(mine[name], yours[name]) for mine, yours in zip(weights, others, strict=True) for name in mine)


@pytest.mark.parametrize("case", ["dp_full", *DEALT_OUT])
def test_uneven_and_empty_draws_hang_nothing(case, on_two):
    """Of 40 draws at q = 1/40 many are empty and most of the others are of one example; where all ranks have to make all
    passes together, the others go through fillers."""
    (weights, examples, *_), (others, of_others, *_) = on_two(case, case not in DEALT_OUT, 1)
    counts = [len(mine) + len(yours) for mine, yours in zip(examples, of_others, strict=True)]
    assert len(counts) == 16
    assert {0, 1} <= set(counts)
    assert all(torch.equal(weights[-1][name], others[-1][name]) for name in weights[-1])


@pytest.mark.parametrize("case", ["dp_full, dealt out", "dp_full, zero2", "dp_full, zero3"])
def test_all_parts_key_the_noise(case, on_two):
    """PRIVACY 35: ranks name weights of which each holds a part by one name, which no other weights have."""
    (*_, (before, after)), (*_, of_the_other) = on_two(case, False, 8)
    assert [before, after] == of_the_other
    assert before != after


def test_copies_that_differ_are_seen(make_run):
    """PRIVACY 17: where every rank holds all weights and moves a part, the others' parts are looked at, too."""
    method = made(make_run, "dp_bitfit", True, 8, ALONE).method
    method.__dict__.pop("_fingerprint")
    copied = {name: parameter.detach().clone() for name, parameter in method.trainable.items()}
    method.dealt = SimpleNamespace(copied=copied)
    before = method._fingerprint()
    copied[min(copied)].view(-1)[-1] += 1e-6
    assert method._fingerprint() != before


@pytest.mark.parametrize("case", DEALT_OUT)
def test_fillers_count_for_nothing(case, on_two, make_run):
    """PRIVACY 18: most of these draws are of no or one example, so that one rank makes the passes of the other's."""
    (weights, *_), (others, *_) = on_two(case, False, 1)
    alone = made(make_run, case, False, 1, ALONE)
    alone.fit()
    for name, value in alone.recorder.weights[-1].items():
        assert torch.equal(weights[-1][name], others[-1][name])
        torch.testing.assert_close(weights[-1][name], value, **TOLERANCE[value.dtype])


@pytest.mark.parametrize(("case", "values"), [("dpzero", 1), ("dpzero with 3 directions", 3), ("dp_bitfit", 179)])
def test_what_travels_is_the_sum_once_a_release(case, values, on_two):
    """Of DPZero one float64 a direction; beside it 32 bytes that say which weights it was taken at, and one of a stop."""
    for _, _, sent, _ in on_two(case, case in WITH_NOISE, 8):
        assert sent.count(("all_gather", 33)) == 5
        ours = [each for each in sent[2:] if each != ("broadcast", 8)]
        assert ours == [("all_gather", 33), ("all_reduce", 8 * values)] * 5
        # The rest is the Trainer's: are loaders of one length, and before each release whether a rank was asked to end.
        assert len(sent) == 2 + 3 * 5
        assert sent[:2] == [("all_reduce", 8)] * 2


@pytest.mark.parametrize("kind", ["dp_full", "dpzero"])
def test_a_rank_gives_its_share_before_it_stops(kind, make_run):
    """The others wait for it: only a process that is alone ends in the middle of a query."""
    for ranks, ends in ((ALONE, True), (Ranks(0, 2), False)):
        run = made(make_run, kind, True, 8, ranks)
        if kind == "dpzero":
            run.method.configure_optimizers()
        run.method.stop_requested = True
        with pytest.raises(Interrupted) if ends else nullcontext():
            assert run.method.query(run.batches[0])


def test_no_rank_makes_a_proof_of_its_own_after_the_preflight(make_run):
    """The others make no such passes, and would wait for ever."""
    run = made(make_run, "dp_bitfit", True, 8, ALONE)
    run.method.dealt = SimpleNamespace(wholes={}, copied={}, level=True)
    close_layouts(run.method)
    with pytest.raises(UserError, match="where the pre-flight saw none"):
        run.method.query(run.batches[0])
