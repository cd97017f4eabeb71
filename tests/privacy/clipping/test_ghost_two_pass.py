"""GhostTwoPass: what its second pass could get wrong."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from privzoo.privacy.clipping import GhostTwoPass, Loop

CASES = runpy.run_path(str(Path(__file__).with_name("test_book_keeping.py")))["CASES"]
X = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, agree):
    """PRIVACY lines 14 and 15: gradients are measured as they come, unless more of the parameter comes later."""
    model = CASES[case]()
    agree(model, model, engine=GhostTwoPass)


def dropout_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).double()


def test_both_passes_see_the_same_dropout_masks():
    """PRIVACY line 28: norms of one mask and gradients of another bound nothing."""
    model = dropout_model()
    found, expected = [], []
    for engine, results in ((GhostTwoPass(model), found), (Loop(model), expected)):
        torch.manual_seed(3)
        results += [engine(lambda: model(X).square().flatten(1).sum(1), 0.5) for _ in range(2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.norms, other.norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(one.sums, other.sums, rtol=0, atol=1e-9)
    assert not torch.equal(found[0].norms, found[1].norms)  # masks of their own for the next micro-batch


@pytest.mark.parametrize("units", [[2, 0, 1, 0], [1, 1, 1, 0]])
def test_a_unit_weights_all_of_its_rows(units, agree):
    """PRIVACY line 37."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    agree(model, lambda: model(X).square().flatten(1).sum(1), torch.tensor(units), engine=GhostTwoPass)


@pytest.mark.parametrize("clip_norm", [0.3, math.inf])
def test_a_poisoned_example_counts_as_nothing_on_top_of_what_is_there(clip_norm):
    """PRIVACY lines 9 and 11: a weighted loss cannot leave it out; what replaces the second pass adds to `into`, too."""
    model = nn.Linear(6, 2).double()
    poisoned = X.clone()
    poisoned[1, 0, 0] = math.nan
    into = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    found = GhostTwoPass(model)(lambda: model(poisoned).square().flatten(1).sum(1), clip_norm, into=into)
    others = GhostTwoPass(model)(lambda: model(X[[0, 2, 3]]).square().flatten(1).sum(1), clip_norm)
    assert found.sums is into
    torch.testing.assert_close(found.norms[[0, 2, 3]], others.norms, rtol=1e-12, atol=0)
    for name, value in others.sums.items():
        torch.testing.assert_close(into[name], value + 3.0, rtol=1e-12, atol=1e-12)
