"""BookKeeping equals the definition on plain torch models: each kind of use of a parameter, alone and together."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from privzoo.privacy.clipping import BookKeeping, gradients, gram, operations

R, T, E = 5, 4, 6
WEIGHTS = torch.randn(E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
UNITS = torch.tensor([2, 0, 2, 1, 0])  # five rows of three units, in no order
X = torch.randn(R, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[3, 1, 0, 0], [3, 3, 3, 5], [0, 0, 0, 0], [1, 2, 3, 4], [6, 6, 1, 0]])
SQUARE_IDS = torch.cat([IDS, IDS[:, :3]], 1)  # as many positions as the table has rows
IMAGES = torch.randn(R, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """`losses(model)` over parts that are made, and registered, in the order given."""

    def __init__(self, losses, **parts):
        super().__init__()
        torch.manual_seed(2)
        for name, part in parts.items():
            setattr(self, name, part())
        self.double()
        self.losses = losses

    def forward(self):
        return self.losses(self)


def parameter(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def scored(hidden):
    """(R, …) to (R,), with a gradient that differs from place to place."""
    flat = hidden.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def rms(m, x):
    return m.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def with_weight(shape, use):
    return Model(
        lambda m: scored(use(m.a(X), m.w)), a=lambda: nn.Linear(E, E), w=lambda: nn.Parameter(1 + torch.rand(shape))
    )


def attention(use, **options):
    return Model(
        lambda m: scored(use(m.b, m.a(X))), a=lambda: nn.Linear(E, E), b=lambda: nn.MultiheadAttention(E, 2, **options)
    )


CASES = {
    "linear on rows": lambda: Model(lambda m: scored(m.a(X[:, 0])), a=lambda: nn.Linear(E, 3)),
    "linear, Gram form": lambda: Model(lambda m: scored(m.a(X[:, :2])), a=lambda: nn.Linear(E, 30)),
    "two layers on one activation, Gram form": lambda: Model(
        lambda m: scored((lambda x: m.a(x).sin() * m.b(x)[..., :20])(X[:, :2])),
        a=lambda: nn.Linear(E, 20), b=lambda: nn.Linear(E, 30),
    ),
    "two layers on unlike activations, Gram form": lambda: Model(
        lambda m: scored(m.a(X[:, :2]).sin() * m.b(X[:, 2:])), a=lambda: nn.Linear(E, 20), b=lambda: nn.Linear(E, 20)
    ),
    "linear, instantiated form": lambda: Model(lambda m: scored(m.a(X)), a=lambda: nn.Linear(E, 2)),
    "linear without bias on four axes": lambda: Model(
        lambda m: scored(m.a(X.reshape(R, 2, 2, E))), a=lambda: nn.Linear(E, 3, bias=False)
    ),
    "a layer used three times": lambda: Model(
        lambda m: scored(m.a(m.a(m.a(X).tanh()).tanh()[:, :2])), a=lambda: nn.Linear(E, E)
    ),
    "embedding and head tied": lambda: Model(
        lambda m: scored(F.linear(m.a(IDS).tanh(), m.a.weight)), a=lambda: nn.Embedding(7, E)
    ),
    "tied, and looked up twice": lambda: Model(
        lambda m: scored(F.linear(m.a(IDS) + m.a(IDS[:, :1]).tanh(), m.a.weight)), a=lambda: nn.Embedding(7, E)
    ),
    "one table as look-up, matrix and summand": lambda: Model(
        lambda m: scored(F.linear(m.a(SQUARE_IDS).tanh() + m.a.weight, m.a.weight)), a=lambda: nn.Embedding(7, E)
    ),
    "padding index": lambda: Model(lambda m: scored(m.a(IDS)), a=lambda: nn.Embedding(7, E, padding_idx=3)),
    "padding index from the end": lambda: Model(
        lambda m: scored(F.embedding(IDS, m.a.weight, padding_idx=-4)), a=lambda: nn.Embedding(7, E)
    ),
    "positions without batch axis": lambda: Model(
        lambda m: scored(m.a(IDS).tanh() * m.p(torch.arange(T))),
        a=lambda: nn.Embedding(7, E), p=lambda: nn.Embedding(T, E),
    ),
    "positions with batch axis 1": lambda: Model(
        lambda m: scored(m.a(IDS).tanh() * m.p(torch.arange(T)[None])),
        a=lambda: nn.Embedding(7, E), p=lambda: nn.Embedding(T, E),
    ),
    "position table added": lambda: Model(lambda m: scored(m.a(X) + m.p), a=lambda: nn.Linear(E, E), p=parameter(T, E)),
    "position table with batch axis 1": lambda: Model(
        lambda m: scored(m.a(X) + m.p), a=lambda: nn.Linear(E, E), p=parameter(1, T, E)
    ),
    "class token": lambda: Model(
        lambda m: scored(torch.cat([m.a(X), m.t.expand(R, -1, -1)], 1).cumsum(1)),
        t=parameter(1, 1, E), a=lambda: nn.Linear(E, E),
    ),
    "RMS norm": lambda: Model(lambda m: scored(rms(m, m.a(X))), a=lambda: nn.Linear(E, E), scale=parameter(E)),
    "one number as scale": lambda: Model(
        lambda m: scored(m.s * m.a(X) - m.s), a=lambda: nn.Linear(E, E), s=parameter()
    ),
    "differences": lambda: Model(
        lambda m: scored((m.u - m.a(X)) * 2 + (m.a(X) - m.u)), a=lambda: nn.Linear(E, E), u=parameter(E)
    ),
    "torch.add with alpha": lambda: Model(
        lambda m: scored(torch.add(m.a(X), m.u, alpha=3)), a=lambda: nn.Linear(E, E), u=parameter(E)
    ),
    "layer norm": lambda: Model(lambda m: scored(m.n(m.a(X))), a=lambda: nn.Linear(E, E), n=lambda: nn.LayerNorm(E)),
    "layer norm over two axes": lambda: Model(
        lambda m: scored(m.n(m.a(X))), a=lambda: nn.Linear(E, E), n=lambda: nn.LayerNorm([T, E])
    ),
    "rows and positions in one axis": lambda: Model(
        lambda m: scored(m.n(m.a(X.reshape(-1, E))).reshape(R, T, E)),
        a=lambda: nn.Linear(E, E), n=lambda: nn.LayerNorm(E),
    ),
    "convolutions": lambda: Model(
        lambda m: scored(m.b(m.a(IMAGES).tanh())),
        a=lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)),
        b=lambda: nn.Conv2d(3, 2, 2, dilation=(1, 2), bias=False),
    ),
    "convolution, padded by reflection": lambda: Model(
        lambda m: scored(m.a(IMAGES)), a=lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    ),
    "operation in place after a layer": lambda: Model(
        lambda m: scored(m.a(X)), a=lambda: nn.Sequential(nn.Linear(E, E), nn.ReLU(inplace=True), nn.Linear(E, 2))
    ),
    "arguments by name": lambda: Model(
        lambda m: scored(F.linear(input=X, weight=m.a.weight, bias=m.a.bias)), a=lambda: nn.Linear(E, 3)
    ),
    "registered in another order than used": lambda: Model(
        lambda m: scored(m.c(m.a(m.b(X).tanh()).tanh())),
        c=lambda: nn.Linear(3, 2), a=lambda: nn.Linear(4, 3), b=lambda: nn.Linear(E, 4),
    ),
    "matrix product": lambda: with_weight((E, 2), lambda x, w: x @ w),
    "transposed": lambda: with_weight((2, E), lambda x, w: torch.matmul(x, w.t())),
    "indexed": lambda: with_weight((2, E), lambda x, w: x * w[0] + w[1]),
    "divided by": lambda: with_weight((E,), lambda x, w: x / w + w / (2 + x.square())),
    "in place on data": lambda: with_weight((E,), lambda x, w: (x * 1).add_(w)),
    "a function of itself": lambda: with_weight((), lambda x, w: x * w.exp()),
    "added to itself": lambda: with_weight((E,), lambda x, w: x + (w + w)),
    "data of a linear layer": lambda: with_weight((1, E), lambda x, w: x + F.linear(w, WEIGHTS, w[0])),
    "shifted by one, as in Gemma": lambda: with_weight((E,), lambda x, w: x * (1.0 + w.double())),
    "meets a constant": lambda: with_weight((E,), lambda x, w: x + w * WEIGHTS[0]),
    "meets a constant as long as twice the rows": lambda: with_weight(
        (1,), lambda x, w: x.flatten(1)[:, : 2 * R] + w * WEIGHTS.flatten()[: 2 * R]
    ),
    "taken as it is and transposed": lambda: with_weight((E, E), lambda x, w: (x @ w).tanh() @ w.t()),
    "meets a constant number": lambda: with_weight((1,), lambda x, w: x[:, :, :R] * (w * torch.ones(1))),
    "meets a mask that has rows": lambda: with_weight(
        (1, E), lambda x, w: x[:, 0] + torch.where(X[:, 0] > 0, w, 0) * 2
    ),
    "rows and positions in one axis, elementwise": lambda: with_weight(
        (E,), lambda x, w: (x.reshape(-1, E) * w).reshape(R, T, E)
    ),
    "relative positions": lambda: with_weight(
        (7, 2), lambda x, w: x + F.embedding(torch.arange(T)[:, None] - torch.arange(T) + 3, w).sum((1, 2))[:, None]
    ),
    "group norm": lambda: Model(lambda m: scored(m.n(m.a(X))), a=lambda: nn.Linear(E, E), n=lambda: nn.GroupNorm(2, T)),
    "grouped convolution": lambda: Model(
        lambda m: scored(m.b(m.a(IMAGES).tanh())),
        a=lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1), b=lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2),
    ),
    "weight norm": lambda: Model(
        lambda m: scored(m.b(m.a(X))),
        a=lambda: nn.Linear(E, E), b=lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(E, 2)),
    ),
    "weight norm, the old one": lambda: Model(
        lambda m: scored(m.b(m.a(X))),
        a=lambda: nn.Linear(E, E), b=lambda: torch.nn.utils.weight_norm(nn.Linear(E, 2)),
    ),
    "spectral norm": lambda: Model(
        lambda m: scored(m.b(m.a(X))),
        a=lambda: nn.Linear(E, E), b=lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(E, 2)).eval(),
    ),
    "batch second": lambda: Model(
        lambda m: scored(m.b(m.a(X.transpose(0, 1)).tanh()).transpose(0, 1)),
        a=lambda: nn.Linear(E, R), b=lambda: nn.Linear(R, 2),
    ),
    "batch second, as many positions as rows": lambda: Model(
        lambda m: scored(m.b(m.a(torch.cat([X, X[:, :1]], 1).transpose(0, 1)).tanh()).transpose(0, 1)),
        a=lambda: nn.Linear(E, R), b=lambda: nn.Linear(R, 2),
    ),
    "positions first in one axis": lambda: Model(
        lambda m: scored(m.a(X.transpose(0, 1).reshape(-1, E)).reshape(T, R, -1).transpose(0, 1)),
        a=lambda: nn.Linear(E, 3),
    ),
    "windows of an example in a row": lambda: Model(
        lambda m: scored(m.a(X.reshape(R * 2, 2, E)).reshape(R, -1)), a=lambda: nn.Linear(E, 3)
    ),
    "self-attention": lambda: attention(lambda m, x: m(x, x, x)[0], batch_first=True),
    "self-attention, batch second": lambda: attention(lambda m, x: m(*3 * [x.transpose(0, 1)])[0].transpose(0, 1)),
    "cross-attention": lambda: attention(lambda m, x: m(x, x.cos(), x.cos())[0], batch_first=True),
    "attention to three things": lambda: attention(lambda m, x: m(x, x.cos(), x.sin())[0], batch_first=True),
    "transformer encoder": lambda: Model(
        lambda m: scored(m.a(X)),
        a=lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 8, 0.0, batch_first=True), 2),
    ),
    "transformer encoder, norm first, batch second": lambda: Model(
        lambda m: scored(m.a(X.transpose(0, 1)).transpose(0, 1)),
        a=lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, 2, 8, 0.0, norm_first=True), 2, enable_nested_tensor=False
        ),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("units", [None, UNITS], ids=["rows", "units"])
def test_equals_the_loop(case, units, agree):
    """PRIVACY lines 14, 15 and 33: norms and sums of every parameter, one norm a unit."""
    model = CASES[case]()
    found = agree(model, model, units)
    assert found.norms.shape == ((R,) if units is None else (3,))
    assert found.losses.shape == (R,)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_as_if_large(case, agree, monkeypatch):
    """PRIVACY lines 14 and 33: nothing instantiated, Gram matrices in blocks of two positions, norms row by row; models as
    small as these, left to themselves, do little of it."""
    monkeypatch.setattr(gradients, "INSTANTIATE_UP_TO", 0.0)
    monkeypatch.setattr(gram, "_BLOCK", 2)
    monkeypatch.setattr(operations, "SMALL", 0)
    model = CASES[case]()
    agree(model, model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_unclipped_sum_is_the_gradient_of_the_sum(case):
    """An oracle of another kind than Loop: plain autograd on all rows at once."""
    model = CASES[case]()
    expected = torch.autograd.grad(model().sum(), list(model.parameters()))
    found = BookKeeping(model)(model, math.inf)
    for (name, _), value in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found.sums[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", ["a.weight", "a.bias", "n.weight", "n.bias", "b.weight"])
def test_frozen_parts_stay_out(frozen, agree):
    """Each part frozen in turn: it is in no sum, and the others' gradients go through it."""
    model = Model(
        lambda m: scored(m.b(m.n(m.a(X)).tanh())),
        a=lambda: nn.Linear(E, E), n=lambda: nn.LayerNorm(E), b=lambda: nn.Linear(E, 3),
    )  # fmt: skip
    model.get_parameter(frozen).requires_grad_(False)
    assert frozen not in agree(model, model).sums


def test_parameters_are_left_as_they_were():
    """The engine leaves no .grad behind and every parameter still requires one."""
    model = CASES["layer norm"]()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    BookKeeping(model)(model, 1.0)
    for name, value in model.named_parameters():
        assert value.grad is None
        assert value.requires_grad
        assert torch.equal(value, before[name])


def test_an_unused_parameter_has_sum_zero(agree):
    model = Model(lambda m: scored(m.a(X)), a=lambda: nn.Linear(E, 3), idle=parameter(2))
    assert not agree(model, model).sums["idle"].any()


def test_a_part_without_gradient_to_the_losses(agree):
    """A use whose output the losses do not depend on leaves nothing in the book."""
    model = Model(lambda m: (m.b(X), scored(m.a(X)))[1], a=lambda: nn.Linear(E, 3), b=lambda: nn.Linear(E, 3))
    assert not agree(model, model).sums["b.weight"].any()


@pytest.mark.parametrize(
    "case", ["class token", "tied, and looked up twice", "positions without batch axis", "linear, Gram form"]
)
def test_sums_are_added_to_what_is_there(case):
    """PRIVACY line 11, engine's part: `into` is added to, not overwritten; instantiated gradients, products, tables."""
    model = CASES[case]()
    fresh = BookKeeping(model)(model, 0.7).sums
    into = {name: torch.full_like(value, 3.0) for name, value in fresh.items()}
    found = BookKeeping(model)(model, 0.7, into=into)
    assert found.sums is into
    for name, value in fresh.items():
        torch.testing.assert_close(into[name], value + 3.0, rtol=0, atol=1e-12)


def test_sums_of_a_bfloat16_model_are_float32():
    """PRIVACY line 27: accumulators are float32 whatever the model's dtype, and the length holds in them."""
    model = CASES["linear, Gram form"]().to(torch.bfloat16)
    x = X[:1, :2].bfloat16()
    found = BookKeeping(model)(lambda: scored(model.a(x)).float(), clip_norm=0.01)
    assert {value.dtype for value in found.sums.values()} == {torch.float32}
    length = torch.sqrt(sum(value.double().square().sum() for value in found.sums.values())).item()
    assert 0.9999 < length / 0.01 < 1 + 1e-6
