"""Where the examples lie is proved again for whatever the first batch left open, and never carried over to another shape."""

import math

import pytest
import torch
from torch import nn

from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.privacy.clipping.layouts import UnsupportedUse, proof_weights

R = T = 4  # as many positions as rows: no shape gives the axis away
E = 6


def x(rows=R, positions=T):
    """(T, R, E)."""
    return torch.randn(positions, rows, E, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


class Gated(nn.Module):
    """(T, R, E) inside, behind a gate."""

    def __init__(self, gate):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(E, E), nn.Linear(E, 2)
        self.gate = nn.Parameter(torch.full((E,), gate))
        self.double()

    def forward(self, x):
        hidden = x.sin() + self.inner(x)
        return self.last(x.transpose(0, 1) + hidden.transpose(0, 1) * self.gate).sin().flatten(1).square().sum(1)


def same_as_the_loop(engine, model, losses):
    found, expected = engine(losses, 0.5), Loop(model)(losses, 0.5)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)


def test_a_gate_that_opens_later():
    """PRIVACY line 33: a gradient of 0 fits every axis and proves none."""
    model = Gated(gate=0.0)
    engine = BookKeeping(model)
    for gate in (0.0, 0.5):
        model.gate.data.fill_(gate)
        same_as_the_loop(engine, model, lambda: model(x()))


@pytest.mark.parametrize("first", [1, 2])
def test_batches_of_other_sizes(first):
    """PRIVACY line 33: one row proves nothing; of two rows among four positions, the axis is found as well."""
    model = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 2)).double()
    engine = BookKeeping(model)
    for rows in (first, R, 3):
        same_as_the_loop(engine, model, lambda rows=rows: model(x(rows)).sin().sum(0).square().sum(1))


def test_an_axis_that_changes_from_batch_to_batch():
    """PRIVACY line 33: what was proved second is not looked for first."""
    model = nn.Linear(E, 2).double()
    engine = BookKeeping(model)
    engine(lambda: model(x(3)).square().sum((0, 2)), 0.5)
    with pytest.raises(UnsupportedUse, match=r"weight gives shape \(3, 4, 2\), where 3 examples cannot lie batch second"):
        engine(lambda: model(x(3).transpose(0, 1)).square().sum((1, 2)), 0.5)


def test_a_poisoned_row_in_the_first_batch():
    """PRIVACY lines 9 and 33: all of row 1 is NaN, so that some of every position is, and NaN fits every axis. The first
    axis is preferred, and the next batch is read right."""
    model = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, 2)).double()
    engine, rows = BookKeeping(model), x().transpose(0, 1)
    poisoned = rows.clone()
    poisoned[1, 0, 0] = math.nan
    found = engine(lambda: model(poisoned).sin().sum(1).square().sum(1), 0.5)
    assert torch.isfinite(found.norms).tolist() == [True, False, True, True]
    same_as_the_loop(engine, model, lambda: model(rows).sin().sum(1).square().sum(1))


def test_gradients_that_are_not_finite_prove_nothing():
    """PRIVACY lines 9 and 33: guessed wrong, one poisoned example would take all others of its batch away."""
    model = nn.Linear(E, E).double()
    poisoned = x()
    poisoned[0] = math.nan
    with pytest.raises(UnsupportedUse, match="not finite hide where the examples lie"):
        BookKeeping(model)(lambda: model(poisoned).sin().sum(0).square().sum(1), 0.5)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40, 300])
def test_any_two_rows_weigh_differently_in_some_turn(rows):
    """PRIVACY line 33: rows of equal weight could stand in for one another. Powers of two scale without rounding."""
    weights = torch.stack(proof_weights(rows, torch.device("cpu")))
    assert weights.shape[1] == rows
    assert len({tuple(column) for column in weights.t().tolist()}) == rows
    assert torch.equal(weights.log2().round().exp2(), weights)


def test_a_part_that_the_losses_come_to_depend_on():
    """PRIVACY line 33: what no gradient reached is not proved again every time, but is as soon as one arrives."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(E, E), "idle": nn.Linear(E, E)}).double()
    engine, passes = BookKeeping(model), []

    def losses(reached):
        hidden = model["a"](x()).sin()
        hidden.register_hook(lambda _: passes.append(1))
        idle = model["idle"](x()).cos()
        return (hidden + idle if reached else hidden).sum(0).square().sum(1)

    for reached, expected in ((False, 3), (False, 1), (True, 4), (True, 1)):
        passes.clear()
        found = engine(lambda reached=reached: losses(reached), 0.5)
        assert len(passes) == expected
        torch.testing.assert_close(found.norms, Loop(model)(lambda reached=reached: losses(reached), 0.5).norms)
