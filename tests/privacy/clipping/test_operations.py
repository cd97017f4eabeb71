"""Ways of reckoning that sizes choose between: each of them, on the same numbers."""

import math

import pytest
import torch
from torch import nn

from privzoo.privacy.clipping import BookKeeping, Loop, gradients, operations

X = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["row by row", "all rows at once"])
@pytest.mark.parametrize("trained", ["weight", "bias", "weight and bias"])
def test_layer_norm(small, trained, monkeypatch, agree):
    monkeypatch.setattr(operations, "SMALL", small)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double()
    for name, parameter in model[1].named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        parameter.requires_grad_(name in trained)
    agree(model, lambda: model(X).sin().flatten(1).sum(1))


@pytest.mark.parametrize("up_to", [0, 1e9], ids=["Gram matrices", "the gradient itself"])
@pytest.mark.parametrize("positions", [3, 32, 40, 70])
def test_pairs(up_to, positions, monkeypatch, agree):
    """Less than a block of positions, a whole one, more; query, key and value meet one activation; a tied head."""
    monkeypatch.setattr(gradients, "INSTANTIATE_UP_TO", up_to)
    torch.manual_seed(2)
    model = nn.ModuleDict({n: nn.Linear(6, 6, bias=False) for n in "qkv"} | {"table": nn.Embedding(9, 6)}).double()
    ids = torch.randint(0, 9, (3, positions))

    def losses():
        hidden = model["table"](ids)
        mixed = torch.softmax(model["q"](hidden) @ model["k"](hidden).transpose(1, 2), -1) @ model["v"](hidden)
        return torch.nn.functional.linear(mixed, model["table"].weight).sin().flatten(1).sum(1)

    agree(model, losses)


def test_gram_matrices_are_reckoned_again_where_positions_cancel():
    """Float32 products of a thousand times the norm lose it: the norm must be that of float64."""
    model = nn.Linear(16, 16, bias=False)
    place = 1000 * torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    x = torch.cat([place, place + 0.5], dim=1)

    def losses():
        hidden = model(x)
        return (hidden[:, 0] - hidden[:, 1]).sum(1)

    exact = Loop(model)(losses, math.inf).norms
    torch.testing.assert_close(BookKeeping(model)(losses, math.inf).norms, exact.to(torch.float64), rtol=0.02, atol=0)
