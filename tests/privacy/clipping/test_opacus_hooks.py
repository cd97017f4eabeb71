"""OpacusHooks: exact where Opacus' hooks are, and refused where they see a part only."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.privacy.clipping import Loop, OpacusHooks
from privzoo.privacy.clipping.layouts import UnsupportedUse

X = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[3, 1, 0], [3, 3, 5], [0, 0, 0], [1, 2, 3]])


class Tied(nn.Module):
    """The head is the table: Opacus' hook of the table does not see what arrives at the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.double()

    def forward(self, ids):
        return F.linear(self.table(ids).tanh(), self.table.weight).sin().flatten(1).sum(1)


@pytest.mark.filterwarnings("ignore")
def test_a_hook_that_sees_a_part_of_the_gradient():
    """PRIVACY line 14: per-sample gradients must add up to autograd's own gradient."""
    model = Tied()
    with pytest.raises(UnsupportedUse, match=r"table\.weight: Opacus' per-sample gradients do not add up"):
        OpacusHooks(model)(lambda: model(IDS), 0.5)


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_another_number_than_rows():
    """PRIVACY line 33: positions in the first axis."""
    model = nn.Linear(6, 2).double()
    with pytest.raises(UnsupportedUse, match="weight: Opacus gave 3 per-sample gradients for 4 rows"):
        OpacusHooks(model)(lambda: model(X.transpose(0, 1)).square().sum((0, 2)), 0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("units", [None, [2, 0, 1, 0]])
def test_equals_the_loop_again_and_again(units):
    """PRIVACY lines 5 and 37: hooks go on and off with every call, and leave nothing of the batch behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    engine, units = OpacusHooks(model), units and torch.tensor(units)
    for scale in (1.0, 0.3):
        losses = lambda s=scale: (s * model(X)).square().flatten(1).sum(1)  # noqa: E731
        found, expected = engine(losses, 0.5, units), Loop(model)(losses, 0.5, units)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)
        assert all(p.grad is None and p.grad_sample is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_poisoned_example_counts_as_nothing():
    """PRIVACY line 9."""
    model = nn.Linear(6, 2).double()
    poisoned = X.clone()
    poisoned[1, 0, 0] = math.nan
    found = OpacusHooks(model)(lambda: model(poisoned).square().flatten(1).sum(1), 0.5)
    others = Loop(model)(lambda: model(X[[0, 2, 3]]).square().flatten(1).sum(1), 0.5)
    torch.testing.assert_close(found.sums, others.sums, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_the_callers_autocast_does_not_round_sums():
    """PRIVACY lines 5 and 27: one row moves the sum by C and no more."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    engine, strength = OpacusHooks(model), torch.tensor([1.0, 0.0])
    for _ in range(20):
        x = torch.randn(2, 3, 32, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = engine(lambda x=x: model(x).float().sin().sum((1, 2)) * strength, 0.1).sums
        assert {value.dtype for value in sums.values()} == {torch.float32}
        assert math.sqrt(sum(float(value.double().square().sum()) for value in sums.values())) <= 0.1 * (1 + 1e-6)
