"""Clipping functions: by hand, within C whatever the norm, and the same in every engine."""

import functools
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from privzoo.composition import build
from privzoo.errors import UserError
from privzoo.privacy.clipping import AutoS, AutoV, BookKeeping, Flat, GhostTwoPass, Loop, OpacusHooks
from privzoo.privacy.clipping.functions import check_function
from privzoo.privacy.preflight import check_engine

SENSITIVITY = runpy.run_path(str(Path(__file__).with_name("test_sensitivity.py")))
Small, Apart, length, random_examples, C = (
    SENSITIVITY[name] for name in ("Small", "Apart", "length", "random_examples", "C")
)
FUNCTIONS = {"Flat": Flat(), "AutoS": AutoS(), "AutoV": AutoV()}
ENGINES = {
    "BookKeeping": BookKeeping,
    "by layer": functools.partial(BookKeeping, groups="layer"),
    "GhostTwoPass": GhostTwoPass,
    "OpacusHooks": OpacusHooks,
}
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.mark.parametrize(
    ("function", "norm", "clip_norm", "factor"),
    [
        (AutoS(stability=0.5), 1.5, 1.0, 0.5),
        (AutoS(stability=0.5), 0.0, 1.0, 2.0),
        (AutoS(stability=0.5), 7.5, 4.0, 0.5),
        (AutoV(), 4.0, 1.0, 0.25),
        (AutoV(), 0.25, 1.0, 4.0),  # longer than it was
        (AutoV(), 0.0, 1.0, 1e12),
        (AutoV(), 1e-20, 3.0, 3e12),
        (Flat(), 4.0, 1.0, 0.25),
        (Flat(), 0.25, 1.0, 1.0),
    ],
)
def test_by_hand(function, norm, clip_norm, factor):
    torch.testing.assert_close(function(torch.tensor([norm]), clip_norm), torch.tensor([factor]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_shipped_functions_keep_the_bound(name):
    """PRIVACY lines 5 and 9, on norms of every size; without clipping nothing is scaled and the poisoned is left out."""
    check_function(FUNCTIONS[name])
    factors = FUNCTIONS[name](torch.tensor([0.0, 1e-9, 5.0, math.nan, math.inf]), math.inf)
    assert factors.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="Expected clip_norm"):
        FUNCTIONS[name](torch.ones(1), 0.0)


WRONG = {
    "twice as long": lambda norms, clip_norm: 2 * Flat()(norms, clip_norm),
    "nothing clipped": lambda norms, clip_norm: Flat()(norms, math.inf),
    "a little too long": lambda norms, clip_norm: Flat()(norms, clip_norm * 1.001),
    "by the largest": lambda norms, clip_norm: Flat()(norms.max().expand_as(norms), clip_norm),
    "non-finite kept": lambda norms, clip_norm: Flat()(norms.nan_to_num(), clip_norm),
    "turned around": lambda norms, clip_norm: -Flat()(norms, clip_norm),
    "the twin scaled": lambda norms, clip_norm: Flat()(norms, min(clip_norm, 1e6)) / 2,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_breaks_the_promise_is_refused(name):
    with pytest.raises(UserError, match=r"must stay within clip_norm|scale nothing at clip_norm=inf"):
        check_function(WRONG[name])


@pytest.mark.parametrize("stability", [0.0, -1.0, 1e-20, math.nan, math.inf, "small", None])
def test_stability_out_of_range(stability):
    with pytest.raises(UserError, match=r"clipping\.stability="):
        AutoS(stability)


class Plain(nn.Module):
    """Modules that all engines know: a wide layer (Gram form), a norm, a narrow layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.norm, self.narrow = nn.Linear(5, 30), nn.LayerNorm(30), nn.Linear(30, 2)
        self.double()

    def forward(self, x):
        return self.narrow(self.norm(self.wide(x)).tanh()).sin().flatten(1).sum(1)


X = torch.randn(6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
STRENGTH = torch.tensor([1e-3, 1.0, 1e3, 0.0, 0.1, 10.0], dtype=torch.float64)


@pytest.mark.parametrize("units", [None, torch.tensor([0, 1, 0, 2, 3, 2])], ids=["rows", "units"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_equals_the_loop(engine, function, units):
    model, clipping = Plain(), FUNCTIONS[function]
    loop = Loop(model, "layer" if engine == "by layer" else "all", clipping)
    expected = loop(lambda: model(X) * STRENGTH, C, units)
    made = ENGINES[engine](model, clipping=clipping)
    for _ in range(2):
        found = made(lambda: model(X) * STRENGTH, C, units)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.sums, expected.sums, rtol=1e-8, atol=1e-10)


def test_the_loop_by_hand():
    """Rows (3, 4), (0, 0.5), (6, 8) at C = 1. AutoV: (0.6, 0.8) + (0, 1) + (0.6, 0.8). AutoS with gamma = 5: factors
    1/10, 1/5.5, 1/15."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.5], [6.0, 8.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    for clipping, expected in ((AutoV(), [1.2, 2.6]), (AutoS(5.0), [0.3 + 0.4, 0.4 + 0.5 / 5.5 + 8 / 15])):
        found = Loop(model, clipping=clipping)(lambda: model(rows).squeeze(1), 1.0).sums["weight"]
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "OpacusHooks"])
def test_one_example_moves_the_sum_by_at_most_c(engine, function):
    """PRIVACY line 5: strengths from 1e-4 to 1e4; and by more than nothing."""
    model, generator = Small(torch.float64), torch.Generator().manual_seed(5)
    made, lengths = ENGINES[engine](model, clipping=FUNCTIONS[function]), []
    for pair in range(40):
        if pair % 10 == 0:
            ids, strength = random_examples(2, generator)
            without = made(lambda i=ids, s=strength: model(i, s), C).sums
        new_ids, new_strength = random_examples(1, generator)
        ids_with, strength_with = torch.cat([new_ids, ids]), torch.cat([new_strength, strength])
        with_it = made(lambda i=ids_with, s=strength_with: model(i, s), C).sums
        lengths.append(length({name: with_it[name] - without[name] for name in with_it}))
    assert max(lengths) <= C * (1 + 1e-6)
    assert min(lengths) > 0
    if function == "AutoV" and engine != "by layer":
        assert min(lengths) > C * (1 - 1e-6)


@pytest.mark.parametrize("engine", ["BookKeeping", "GhostTwoPass"])
@pytest.mark.parametrize("function", ["AutoS", "AutoV"])
@pytest.mark.parametrize("strength", [1e-42, 1e-30, 1e-20, 1e-14, 1e-8, 1e8, 1e17, 1e25])
def test_gradients_of_any_size_in_float32(engine, function, strength):
    """PRIVACY line 5: where squares underflow the norm says 0, and a factor of C / 0 would publish the gradient."""
    model = Small(torch.float32)
    ids, alone = torch.tensor([[3, 5], [1, 1]]), torch.tensor([strength, 0.0])
    made = ENGINES[engine](model, clipping=FUNCTIONS[function])
    made(lambda: model(ids, torch.ones(2)), C)
    sums = made(lambda: model(ids, alone), C).sums
    assert all(torch.isfinite(value).all() for value in sums.values())
    assert length(sums) <= C * (1 + 1e-6)


@pytest.mark.parametrize("engine", ["BookKeeping", "GhostTwoPass"])
@pytest.mark.parametrize("width", [16, 1], ids=["Gram form", "instantiated form"])
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 0.0])
def test_places_that_cancel(engine, width, apart):
    """PRIVACY lines 5 and 27: what rounding leaves of a gradient that cancels is made no longer than C, either."""
    model = Apart(width)
    made = ENGINES[engine](model, clipping=AutoV())
    for seed in range(10):
        place = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed)) * 1000
        x = torch.cat([place, place + apart], dim=1)
        assert length(made(lambda x=x: model(x), C).sums) <= C * (1 + 1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_poisoned_row_is_left_out(engine, function):
    """PRIVACY line 9; short gradients, so that the functions differ."""
    model = Plain()
    made, poison = ENGINES[engine](model, clipping=FUNCTIONS[function]), torch.full((6,), 1e-3, dtype=torch.float64)
    others = Loop(model, made.groups if engine == "by layer" else "all", FUNCTIONS[function])
    expected = others(lambda: model(X[[0, 1, 3, 4, 5]]) * 1e-3, C).sums
    poison[2] = math.nan
    found = made(lambda: model(X) * poison, C).sums
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


class Claiming:
    """Says that it clips by one function, and clips by another."""

    def __init__(self, model, groups, clipping, truly):
        self.groups, self.clipping, self.truly = groups, clipping, BookKeeping(model, groups, truly)

    def __call__(self, *args, **kwargs):
        return self.truly(*args, **kwargs)


def preflight(engine, model):
    """With gradients shorter than the clip norm, so that the functions differ."""
    check_engine(engine, model, lambda batch: model(batch["x"]) * 1e-5, list(X), lambda rows: {"x": torch.stack(rows)}, 0.5)


@pytest.mark.parametrize("groups", ["all", "layer"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_preflight_compares_by_the_engines_own_function(function, groups):
    model = Plain()
    preflight(BookKeeping(model, groups, FUNCTIONS[function]), model)


@pytest.mark.parametrize(("claimed", "truly"), [("Flat", AutoV()), ("AutoS", Flat()), ("AutoV", AutoS())])
def test_the_preflight_finds_another_function(claimed, truly):
    model = Plain()
    with pytest.raises(UserError, match="Pre-flight: the clipped sum"):
        preflight(Claiming(model, "all", FUNCTIONS[claimed], truly), model)


def test_the_preflight_refuses_a_wrong_function():
    """Engine and loop would agree with each other."""
    model = Plain()
    with pytest.raises(UserError, match="must stay within clip_norm"):
        preflight(BookKeeping(model, clipping=WRONG["twice as long"]), model)


@pytest.mark.parametrize("method", ["dp_full", "dp_bitfit"])
def test_by_name_on_the_command_line(method, run_config):
    assert build(run_config(f"method={method}").method).keywords["engine"].keywords["clipping"] == Flat()
    target = "method.engine.clipping._target_=privzoo.privacy.clipping.AutoS"
    made = build(run_config(f"method={method}", target, "+method.engine.clipping.stability=0.1").method)
    assert made.keywords["engine"](nn.Linear(2, 2)).clipping == AutoS(0.1)
