"""What all engines share, by hand arithmetic."""

import math

import pytest
import torch
from torch import nn

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop, OpacusHooks, clip_factors
from privzoo.privacy.clipping.engine import sum_dtype, trainable_parameters, zero_sums

ENGINES = [BookKeeping, GhostTwoPass, Loop, OpacusHooks]
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # of Opacus, which puts up with it


@pytest.mark.parametrize(
    ("norm", "clip_norm", "factor"),
    [
        (0.0, 1.0, 1.0),  # a zero gradient is within any norm
        (0.5, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (4.0, 1.0, 0.25),
        (4.0, 0.5, 0.125),
        (1e-45, 1.0, 1.0),
        (3e38, 3.0, 1e-38),
        (math.nan, 1.0, 0.0),
        (math.inf, 1.0, 0.0),
        (4.0, math.inf, 1.0),
        (math.nan, math.inf, 0.0),  # the twin without privacy leaves poisoned examples out, too
        (math.inf, math.inf, 0.0),
    ],
)
def test_clip_factors(norm, clip_norm, factor):
    """PRIVACY line 9: min(1, C / norm), and 0 where the norm is not finite."""
    torch.testing.assert_close(clip_factors(torch.tensor([norm]), clip_norm), torch.tensor([factor]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_clip_norm_must_be_positive(clip_norm):
    with pytest.raises(ValueError, match="Expected clip_norm"):
        clip_factors(torch.ones(1), clip_norm)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["a mean", "one a token"])
def test_losses_that_are_not_one_a_row(engine, shape):
    """PRIVACY lines 5 and 7: a batch mean, or a loss a token, is refused with a sentence."""
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"Expected one loss a row, shape \(R,\), found shape .*was a mean taken"):
        engine(model)(lambda: model(torch.ones(3, 2)).square().sum_to_size(shape), clip_norm=1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_units_that_do_not_match_the_losses(engine):
    model = nn.Linear(2, 1)
    with pytest.raises(UserError, match=r"unit_of_row of shape \(3,\), found \(2,\)"):
        engine(model)(lambda: model(torch.ones(3, 2)).sum(1), clip_norm=1.0, unit_of_row=torch.tensor([0, 1]))


def test_a_tied_parameter_counts_once():
    """PRIVACY line 14."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    assert list(trainable_parameters(model)) == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_accumulators_are_float32_at_least(dtype, expected):
    """PRIVACY line 27."""
    parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    assert sum_dtype(parameter) == expected
    found = zero_sums({"w": parameter})["w"]
    assert found.dtype == expected
    assert found.shape == (2, 3)
    assert not found.any()
    assert not found.requires_grad


ROWS = torch.tensor([[3.0, 4.0], [0.0, 0.5], [6.0, 8.0]], dtype=torch.float64)


def score():
    """A row's loss is w · row: its gradient is the row."""
    model = nn.Linear(2, 1, bias=False).double()
    return model, lambda: model(ROWS).squeeze(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipped_sum_by_hand(engine):
    """PRIVACY lines 5 and 33. Norms 5, 0.5, 10; at C = 1: (0.6, 0.8) + (0, 0.5) + (0.6, 0.8) = (1.2, 2.1)."""
    model, losses = score()
    found = engine(model)(losses, clip_norm=1.0)
    torch.testing.assert_close(found.norms, torch.tensor([5.0, 0.5, 10.0], dtype=torch.float64))
    torch.testing.assert_close(found.sums["weight"], torch.tensor([[1.2, 2.1]], dtype=torch.float64))


@pytest.mark.parametrize("engine", ENGINES)
def test_units_are_summed_before_they_are_clipped(engine):
    """Rows 0 and 2 are unit 1: (9, 12), norm 15; at C = 1: (0.6, 0.8) + (0, 0.5) = (0.6, 1.3), not (1.2, 2.1)."""
    model, losses = score()
    found = engine(model)(losses, clip_norm=1.0, unit_of_row=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found.norms, torch.tensor([0.5, 15.0], dtype=torch.float64))
    torch.testing.assert_close(found.sums["weight"], torch.tensor([[0.6, 1.3]], dtype=torch.float64))


@pytest.mark.parametrize("engine", ENGINES)
def test_sums_are_added_to_what_is_there_by_hand(engine):
    """PRIVACY line 11: two micro-batches of (1.2, 2.1) on top of (10, 20); the accumulators stay the same tensors."""
    model, losses = score()
    into = {"weight": torch.tensor([[10.0, 20.0]], dtype=torch.float64)}
    total, made = into["weight"], engine(model)
    for _ in range(2):
        assert made(losses, clip_norm=1.0, into=into).sums is into
    assert into["weight"] is total
    torch.testing.assert_close(total, torch.tensor([[12.4, 24.2]], dtype=torch.float64))


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_and_their_grad_are_left_as_they_were(engine):
    """What an optimizer finds in .grad is never an engine's leftover."""
    model, losses = score()
    before = model.weight.detach().clone()
    engine(model)(losses, clip_norm=1.0)
    assert model.weight.grad is None
    assert model.weight.requires_grad
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_result_holds_no_graph(engine):
    """Losses, norms and sums of a release keep no activation alive."""
    model, losses = score()
    found = engine(model)(losses, clip_norm=1.0)
    assert not any(t.requires_grad for t in (found.losses, found.norms, *found.sums.values()))


def test_loop_is_the_definition(transformer):
    """The oracle against torch.func, which knows nothing of this package: norms of every example, unclipped sum."""
    model, losses = transformer("BERT")
    found = Loop(model)(losses, math.inf)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, row):
            return losses(slice(row, row + 1)).sum()

    for row in range(4):
        own = torch.func.grad(lambda p, row=row: torch.func.functional_call(Losses(), p, (row,)))(
            {f"model.{name}": value for name, value in parameters.items()}
        )
        norm = torch.sqrt(sum(value.square().sum() for value in own.values()))
        torch.testing.assert_close(found.norms[row], norm, rtol=1e-9, atol=0)
