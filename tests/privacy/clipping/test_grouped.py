"""Group-wise clipping: equal to its definition, no unit moves the sum by more than C, and nothing is kept meanwhile."""

import functools
import math
import runpy
import weakref
from pathlib import Path

import pytest
import torch

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, Loop, gradients
from privzoo.privacy.clipping.grouped import grouping

PLAIN = runpy.run_path(str(Path(__file__).with_name("test_book_keeping.py")))
CASES, UNITS, X, Model, scored = (PLAIN[name] for name in ("CASES", "UNITS", "X", "Model", "scored"))
BY_LAYER = {engine.__name__: functools.partial(engine, groups="layer") for engine in (BookKeeping, Loop)}


def by_hand(model, forward, clip_norm):
    """Clipped sums from autograd alone: each module's part of each row's gradient within C / sqrt(modules)."""
    names = [name for name, _ in model.named_parameters()]
    modules = {name.rpartition(".")[0] for name in names}
    losses = forward()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in losses:
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)
        row = dict(zip(names, found, strict=True))
        for module in modules:
            part = [name for name in names if name.rpartition(".")[0] == module]
            length = math.sqrt(sum(float(row[name].square().sum()) for name in part))
            for name in part:
                sums[name] += row[name] * min(1.0, clip_norm / math.sqrt(len(modules)) / max(length, 1e-300))
    return sums


@pytest.mark.parametrize("engine", BY_LAYER)
def test_by_hand(engine):
    model = CASES["layer norm"]()
    norms = Loop(model)(model, math.inf).norms
    found, expected = BY_LAYER[engine](model)(model, float(norms.mean())), by_hand(model, model, float(norms.mean()))
    assert found.sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.norms, norms)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("units", [None, UNITS], ids=["rows", "units"])
def test_equals_the_loop(case, units):
    """Tied, reused and derived parameters wait for their last use; a second call finds all proved and clips at once."""
    model = CASES[case]()
    clip_norm = float(Loop(model)(model, math.inf, units).norms.mean())
    expected, engine = BY_LAYER["Loop"](model)(model, clip_norm, units), BY_LAYER["BookKeeping"](model)
    for _ in range(2):
        same(engine(model, clip_norm, units), expected)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT"])
def test_transformers_equal_the_loop(name, transformer):
    model, losses = transformer(name)
    clip_norm = float(Loop(model)(losses, math.inf).norms.mean())
    expected, engine = BY_LAYER["Loop"](model)(losses, clip_norm), BY_LAYER["BookKeeping"](model)
    for _ in range(2):
        same(engine(losses, clip_norm), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant, transformer):
    """What is only seen when it is recomputed is not clipped before it is proved, and not twice."""
    model, losses = transformer("BERT")
    clip_norm = float(Loop(model)(losses, math.inf).norms.mean())
    expected, engine = BY_LAYER["Loop"](model)(losses, clip_norm), BY_LAYER["BookKeeping"](model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for _ in range(2):
        same(engine(losses, clip_norm), expected)


def test_a_use_that_is_reached_later():
    """Its place is proved in the middle of a backward pass, after which all is collected anew: what came before it must
    not have been clipped and added already."""
    reached = {"b": False}

    def losses(m):
        other = scored(m.b(X))
        return scored(m.a(X)) + (other if reached["b"] else 0)

    model = Model(losses, a=lambda: torch.nn.Linear(6, 3), b=lambda: torch.nn.Linear(6, 3))
    engine = BY_LAYER["BookKeeping"](model)
    for reached["b"] in (False, True, True):
        same(engine(model, 0.7), BY_LAYER["Loop"](model)(model, 0.7))


def same(found, expected):
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-8, atol=0)
    scale = max(float(value.abs().max()) for value in expected.sums.values())
    assert found.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=0, atol=1e-8 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e4])
def test_one_unit_moves_the_sum_by_at_most_c(strength):
    """PRIVACY line 5: by as much as C where all layers are clipped, and never more."""
    model = CASES["layer norm"]()
    engine, clip_norm = BY_LAYER["BookKeeping"](model), 0.3
    with_it = engine(lambda: model() * torch.tensor([1.0, 1, strength, 1, 1]), clip_norm).sums
    without = engine(lambda: model() * torch.tensor([1.0, 1, 0, 1, 1]), clip_norm).sums
    moved = math.sqrt(sum(float((with_it[name] - without[name]).square().sum()) for name in with_it))
    assert moved <= clip_norm * (1 + 1e-9)
    assert moved > 0.9 * clip_norm or strength < 1


class Scaled(torch.nn.Module):
    """One module, and so one group, whose last part to arrive is an elementwise scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.scale = torch.nn.Parameter(torch.randn(64, 64) / 8), torch.nn.Parameter(torch.ones(64))

    def forward(self, x, v):
        return ((torch.nn.functional.linear(x, self.weight) * self.scale).float() @ v).sum(1)


@pytest.mark.parametrize("groups", ["all", "layer"])
def test_the_callers_autocast_does_not_round_norms_and_sums(groups):
    """PRIVACY lines 5 and 27: as under Lightning's bf16-mixed; one row moves the sum by C, not by 1.004 C."""
    model, generator = Scaled(), torch.Generator().manual_seed(1)
    engine = BookKeeping(model, groups)
    for _ in range(20):
        x, v = torch.randn(1, 2, 64, generator=generator), torch.randn(64, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = engine(lambda x=x, v=v: model(x, v), 0.1).sums
        assert {value.dtype for value in sums.values()} == {torch.float32}
        assert math.sqrt(sum(float(value.double().square().sum()) for value in sums.values())) <= 0.1 * (1 + 1e-6)


def test_a_poisoned_row_is_left_out():
    model = CASES["layer norm"]()
    engine, poison = BY_LAYER["BookKeeping"](model), torch.tensor([1.0, 1, math.nan, 1, 1])
    engine(model, 0.3)
    found = engine(lambda: model() * poison, 0.3)
    expected = engine(lambda: model() * torch.tensor([1.0, 1, 0, 1, 1]), 0.3)
    assert found.norms.isnan().tolist() == [False, False, True, False, False]
    for name, value in expected.sums.items():
        torch.testing.assert_close(found.sums[name], value, rtol=1e-9, atol=1e-12)


def test_groups_hang_on_the_model_alone():
    """A module that a batch makes no use of has its share of C all the same."""
    assert grouping(["a.w", "a.b", "b.w", "c"], "layer", 3.0).clip_norm == pytest.approx(3 / math.sqrt(3))
    assert grouping(["a.w", "a.b", "b.w", "c"], "all", 3.0).clip_norm == 3.0
    used = Model(lambda m: scored(m.a(X)) * 1e6, a=lambda: torch.nn.Linear(6, 3))
    idle = Model(lambda m: scored(m.a(X)) * 1e6, a=lambda: torch.nn.Linear(6, 3), b=lambda: torch.nn.Linear(6, 3))
    large, small = (BY_LAYER["BookKeeping"](model)(model, 1.0).sums["a.weight"] for model in (used, idle))
    torch.testing.assert_close(small * math.sqrt(2), large)


def test_nothing_is_kept_until_the_end(monkeypatch):
    """At most one layer's pair is alive at a time, where flat clipping keeps them all."""
    alive, most = weakref.WeakSet(), 0
    made = gradients.Pair

    def counted(*fields):
        nonlocal most
        pair = made(*fields)
        alive.add(pair)
        most = max(most, len(alive))
        return pair

    monkeypatch.setattr(gradients, "Pair", counted)
    layers = {name: lambda: torch.nn.Linear(30, 30) for name in "abcde"}
    x = torch.randn(5, 2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Model(lambda m: scored(m.e(m.d(m.c(m.b(m.a(x)))))), **layers)
    for groups, expected in (("all", 5), ("layer", 1)):
        engine, most = BookKeeping(model, groups), 0
        engine(model, 1.0)
        most = 0
        engine(model, 1.0)
        assert most == expected


@pytest.mark.parametrize("engine", [BookKeeping, Loop])
def test_unknown_groups_are_refused(engine):
    with pytest.raises(UserError, match="=all or layer"):
        engine(torch.nn.Linear(2, 2), groups="blocks")
