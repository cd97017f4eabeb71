"""PRIVACY line 13: gradient checkpointing of both kinds, with every engine, gives the gradients that it gives without."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop, OpacusHooks
from privzoo.privacy.clipping.layouts import UnsupportedUse

ENGINES = [BookKeeping, GhostTwoPass, Loop]
X = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reentrant", "engine"),
    [
        *product(["BERT", "GPT-2", "Llama", "ViT"], [True, False], ENGINES),
        *product(["Llama", "ViT"], [True], [OpacusHooks]),  # more it refuses, see below
    ],
)
def test_of_transformers(name, reentrant, engine, transformer):
    """As a user turns it on; reentrant checkpointing needs an input that requires a gradient, as with peft."""
    model, losses = transformer(name)
    expected = Loop(model)(losses, 0.5)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found = engine(model)(losses, 0.5)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_opacus_hooks_are_refused_where_recomputation_hides_gradients_from_them(name, transformer):
    """Hooks of the recomputed modules do not run in the backward pass: gradients would count as none."""
    model, losses = transformer(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(UnsupportedUse, match=r"q_proj\.weight: Opacus gave no per-sample gradient, though it is used"):
        OpacusHooks(model)(losses, 0.5)


class Mixed(nn.Module):
    """A layer used inside and outside of the checkpointed part, with a scale inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.norm = nn.LayerNorm(6)
        self.double()

    def forward(self, reentrant=None):
        hidden = self.shared(X)
        part = lambda x: self.norm(self.shared(x.tanh()) * self.scale)  # noqa: E731
        hidden = part(hidden) if reentrant is None else checkpoint(part, hidden, use_reentrant=reentrant)
        return hidden.sin().flatten(1).sum(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_inside_and_outside(reentrant, engine):
    model = Mixed()
    expected = Loop(model)(model, 0.5)
    made = engine(model)
    for _ in range(2):  # the first call proves where the examples lie, the second one knows
        found = made(lambda: model(reentrant), 0.5)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_opacus_hooks_refuse_a_layer_inside_and_outside(reentrant):
    model = Mixed()
    with pytest.raises(UnsupportedUse, match="Opacus"):
        OpacusHooks(model)(lambda: model(reentrant), 0.5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_parameter_made_of_others_inside_is_refused(reentrant):
    """Its gradient would have to go back through what was recomputed."""
    torch.manual_seed(0)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)).double()
    x = X.clone().requires_grad_()
    with pytest.raises(UnsupportedUse, match="turn checkpointing off, or freeze it"):
        BookKeeping(normed)(lambda: checkpoint(normed, x, use_reentrant=reentrant).sin().flatten(1).sum(1), 0.5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_same_dropout_masks(reentrant):
    """PRIVACY line 28: the recomputation sees the masks of the forward pass."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).double()

    def losses():
        torch.manual_seed(3)
        return checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant).square().flatten(1).sum(1)

    for engine in (BookKeeping, GhostTwoPass):
        found, expected = engine(model)(losses, math.inf), Loop(model)(losses, math.inf)
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)
