"""What BookKeeping cannot treat exactly is refused by the name of the parameter: nothing is trained in part."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping
from privzoo.privacy.clipping.layouts import UnsupportedUse

R, T, E = 3, 4, 6
X = torch.randn(R, T, E, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[3, 1, 0, 0], [3, 3, 3, 5], [0, 0, 0, 2]])
IMAGES = torch.randn(R, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def refused(forward, parts, name):
    """BookKeeping raises for `forward(parts)`, (R, …) summed to losses, and its sentence names the parameter."""
    model = nn.ModuleDict(parts)
    with pytest.raises(UnsupportedUse, match=name):
        BookKeeping(model)(lambda: forward(model).flatten(1).sum(1), clip_norm=1.0)


class Held(nn.Module):
    """A parameter and a way to use it."""

    def __init__(self, shape, use):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.use = use

    def forward(self, x):
        return self.use(x, self.weight)


USES = {
    "einsum": ((2, E), lambda x, w: torch.einsum("rte,oe->rto", x, w)),
    "einsum, then scaled by data": ((T, E), lambda x, w: torch.einsum("rte,te->rte", x, w) * x.tanh()),
    "in a list": ((E,), lambda x, w: torch.stack([x, w.expand_as(x)])),
    "concatenated": ((R, T, 1), lambda x, w: torch.cat([x, w], dim=2)),
    "by keyword": ((E,), lambda x, w: torch.where(condition=x > 0, input=x, other=w)),
    "repeated": ((1, 1, E), lambda x, w: torch.cat([x, w.repeat(R, 1, 1)], dim=1)),
    "addmm with beta": ((E, 2), lambda x, w: torch.addmm(x.new_zeros(2), x[:, 0], w, beta=0.5)),
    "as large as the batch": ((R, T, E), lambda x, w: x * w),
    "batch norm": ((T,), lambda x, w: F.batch_norm(x, None, None, w, training=True)),
    "functional one-dimensional convolution": ((2, T, 3), lambda x, w: F.conv1d(x, w)),
}


@pytest.mark.parametrize("use", USES)
def test_an_unknown_use_of_a_parameter(use):
    shape, function = USES[use]
    refused(lambda m: m["b"](m["a"](X)), {"a": nn.Linear(E, E), "b": Held(shape, function)}, "b.weight")


LAYERS = {
    "LSTM": (nn.LSTM(E, 2, batch_first=True), lambda m: m(X)[0], "weight_ih_l0"),
    "bilinear": (nn.Bilinear(E, E, 2), lambda m: m(X, X), "weight"),
    "transposed convolution": (nn.ConvTranspose2d(4, 2, 2), lambda m: m(IMAGES), "weight"),
    "convolution with named padding": (nn.Conv2d(4, 2, 3, padding="same"), lambda m: m(IMAGES), "weight"),
    "embedding with max_norm": (nn.Embedding(7, E, max_norm=1.0), lambda m: m(IDS), "weight"),
    "embedding scaled by frequency": (nn.Embedding(7, E, scale_grad_by_freq=True), lambda m: m(IDS), "weight"),
    "sparse embedding": (nn.Embedding(7, E, sparse=True), lambda m: m(IDS), "weight"),
    "bag of embeddings": (nn.EmbeddingBag(7, E), lambda m: m(IDS), "weight"),
    "PReLU": (nn.PReLU(), lambda m: m(X), "weight"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_an_unknown_layer(layer):
    """The layer is in training mode, as it is when fine-tuned."""
    module, call, name = LAYERS[layer]
    refused(lambda m: call(m["layer"]), {"layer": module.train()}, f"layer.{name}")


class Scaled(torch.autograd.Function):
    """A hand-written operation, as fused kernels are: its inside is not made of torch functions."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        with torch._C.DisableTorchFunction():
            return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).flatten(0, -2).sum(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("hidden", ["TorchScript", "autograd.Function", "graph made before"])
def test_a_use_that_is_out_of_sight(hidden):
    """PRIVACY line 16: a use that no torch function shows is found by the gradient that arrives at the parameter."""
    if hidden == "TorchScript":
        refused(lambda m: m["b"](m["a"](X)), {"a": nn.Linear(E, E), "b": torch.jit.script(nn.Linear(E, 2))}, "b.weight")
    elif hidden == "autograd.Function":
        refused(lambda m: m["b"](m["a"](X)), {"a": nn.Linear(E, E), "b": Held((E,), Scaled.apply)}, "b.weight")
    else:
        held = Held((E,), None)
        before = held.weight.tanh()
        refused(lambda m: m["a"](X) * before, {"a": nn.Linear(E, E), "b": held}, "b.weight")


def test_a_frozen_layer_of_any_kind_is_no_obstacle(agree):
    """Only trainable parameters matter: DP-BiTFiT on a model with attention that the engine does not know."""
    attention = nn.MultiheadAttention(E, 2, batch_first=True).requires_grad_(False).double()
    model = nn.ModuleDict({"a": nn.Linear(E, E).double(), "attention": attention})

    def forward():
        hidden = model["a"](X.double())
        return attention(hidden, hidden, hidden)[0].square().flatten(1).sum(1)

    agree(model, forward)


def test_no_axis_that_holds_the_examples():
    """PRIVACY line 33: examples share positions, so that no reading of the tensor keeps them apart."""
    model = nn.ModuleDict({"a": nn.Linear(E, E), "b": nn.Linear(E, 2)})
    with pytest.raises(UnsupportedUse, match=r"a\.weight: no axis of its output holds one example each"):
        BookKeeping(model)(lambda: model["b"](mixed(model["a"](X))).flatten(1).sin().sum(1), clip_norm=1.0)


def mixed(hidden):
    """Half of each example's positions come from its neighbour."""
    return torch.cat([hidden[:, : T // 2], hidden.roll(1, 0)[:, T // 2 :]], dim=1)


def test_an_axis_that_cannot_hold_the_examples():
    """PRIVACY line 33: neither R rows nor a multiple, and not second."""
    model = nn.Linear(E, 2)
    with pytest.raises(UnsupportedUse, match="weight: no axis of its output"):
        BookKeeping(model)(lambda: model(X[:2].transpose(0, 1)).sum() * torch.ones(3), clip_norm=1.0)


def test_positions_that_are_looked_up_before_any_data():
    """The number of rows is that of the first operation: wrong there, the copies would be too many or too few."""
    model = nn.ModuleDict({"p": nn.Embedding(T, E), "a": nn.Linear(E, E)})
    with pytest.raises((UserError, RuntimeError)):
        BookKeeping(model)(lambda: (model["p"](torch.arange(T)[None]) + model["a"](X)).flatten(1).sum(1), clip_norm=1.0)


def test_one_position_that_is_looked_up_before_any_data():
    """As above, where one copy instead of three would fit all the same."""
    model = nn.ModuleDict({"p": nn.Embedding(T, E), "a": nn.Linear(E, E)})
    with pytest.raises(UnsupportedUse, match=r"Expected 3 rows \(one a loss\) at the first operation, found 1"):
        BookKeeping(model)(lambda: (model["p"](torch.arange(1)[None]) + model["a"](X)).flatten(1).sum(1), clip_norm=1.0)
