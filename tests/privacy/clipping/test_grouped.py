"""Group-wise clipping: equal to its definition, no unit moves the sum by more than C, and nothing is kept meanwhile."""

import functools
import math
import re
import runpy
import weakref
from pathlib import Path

import pytest
import torch

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, Loop, gradients
from privzoo.privacy.clipping.grouped import grouping
from privzoo.privacy.preflight import check_engine

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


# ---- uneven shares

SHARES = {"norm": 4.0, "first": 0.5}


def test_shares_of_the_clip_norm():
    """C_l = C w_l / sqrt(sum of w^2), one weight a layer, and the squares of all C_l add up to that of C."""
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"]
    groups = grouping(names, "layer", 2.0, shares=SHARES)
    long = torch.tensor([1e9])
    found = {group: float(groups.factors(group, long) * long) for group in ("first", "norm", "last")}
    unit = 2.0 / math.sqrt(0.5**2 + 4.0**2 + 1)
    assert found == pytest.approx({"first": 0.5 * unit, "norm": 4 * unit, "last": unit})
    assert sum(value**2 for value in found.values()) == pytest.approx(4.0)
    first = grouping(names, "layer", 2.0, shares={"no": 3.0, "norm|last": 2.0})
    assert first.weights == {"norm": 3.0, "last": 2.0}  # the first expression that is found


@pytest.mark.parametrize("strength", [1.0, 1e4])
@pytest.mark.parametrize("engine", [BookKeeping, Loop])
def test_one_unit_moves_the_sum_by_at_most_c_whatever_the_shares(engine, strength):
    model = CASES["layer norm"]()
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    made, clip_norm = engine(model, "layer", shares={sorted(layers)[0]: 9.0}), 0.3
    with_it = made(lambda: model() * torch.tensor([1.0, 1, strength, 1, 1]), clip_norm).sums
    without = made(lambda: model() * torch.tensor([1.0, 1, 0, 1, 1]), clip_norm).sums
    moved = math.sqrt(sum(float((with_it[name] - without[name]).square().sum()) for name in with_it))
    assert 0.1 * clip_norm < moved <= clip_norm * (1 + 1e-9)


@pytest.mark.parametrize("case", ["layer norm", "self-attention", "weight norm"])
def test_with_shares_it_equals_the_loop(case):
    model = CASES[case]()
    layer = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters()})[0]
    clip_norm = float(Loop(model)(model, math.inf).norms.mean())
    expected, even = (Loop(model, "layer", shares=shares)(model, clip_norm) for shares in ({layer: 7.0}, None))
    assert any(not torch.allclose(value, even.sums[name]) for name, value in expected.sums.items())
    engine = BookKeeping(model, "layer", shares={layer: 7.0})
    for _ in range(2):
        same(engine(model, clip_norm), expected)


def test_the_preflight_clips_by_the_same_shares():
    """PRIVACY line 33."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    engine = BookKeeping(model, "layer", shares={"2": 5.0})
    check_engine(engine, model, lambda batch: model(batch["x"])[:, 0], rows, lambda r: {"x": torch.stack(r)}, 0.5)


@pytest.mark.parametrize(
    ("groups", "shares", "said"),
    [
        ("all", {"a": 2.0}, "set method.engine.groups=layer"),
        ("layer", {"a": 0.0}, "shares[a]=0.0 to be a number above 0"),
        ("layer", {"a": math.inf}, "shares[a]=inf to be a number above 0"),
        ("layer", {"a": "much"}, "shares[a]=much to be a number above 0"),
        ("layer", {"nowhere": 2.0}, "names 'nowhere', which no group"),
    ],
)
def test_wrong_shares_are_one_sentence(groups, shares, said):
    model = CASES["layer norm"]()
    with pytest.raises(UserError, match=re.escape(said)):
        BookKeeping(model, groups, shares=shares)(model, 1.0)


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
