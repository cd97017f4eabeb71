"""Where an engine could misread a model and say nothing: each of these was found by attacking it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from privzoo.privacy.clipping import BookKeeping, GhostTwoPass, Loop, OpacusHooks, UnsupportedUse


def assert_exact(engine, model, losses, C=0.5):
    found, expected = engine(losses, C), Loop(model)(losses, C)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()


def x(*shape):
    return torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
def test_bf16_autocast_of_several_rows(name, transformer):
    model, losses = transformer(name, torch.float32)
    engine = BookKeeping(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine(losses, 0.5)
    assert engine.layouts.proved
    assert set(engine.layouts.proved.values()) == {"batch first"}
    expected = Loop(model)(losses, 0.5)  # in float32: bf16 is within its own rounding of it
    torch.testing.assert_close(found.norms, expected.norms, rtol=0.1, atol=0)


@pytest.mark.parametrize("mixes", [False, True])
def test_all_inside_reentrant_checkpointing(mixes):
    model, data = mlp(), x(4, 4)  # (T, R, E)

    def losses():
        h = checkpoint(model, data.clone().requires_grad_(), use_reentrant=True)
        h = h - h.mean(1, keepdim=True) if mixes else h
        return h.sin().sum(0).square().sum(1)

    if mixes:
        with pytest.raises(UnsupportedUse, match="no axis of its output holds one example each"):
            BookKeeping(model)(losses, 0.5)
    else:
        assert_exact(BookKeeping(model), model, losses)


def test_reentrant_and_a_gate_that_opens_later():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(6, 3)
            nn.init.zeros_(self.b.weight)
            self.double()

        def forward(self, data):
            h = checkpoint(lambda x: x + self.b(self.a(x)), data.clone().requires_grad_(), use_reentrant=True)
            return self.head(h.sin().sum(0)).square().sum(1)

    model = Lora()
    engine = BookKeeping(model)
    assert_exact(engine, model, lambda: model(x(4, 4)))
    model.b.weight.data.normal_()
    assert_exact(engine, model, lambda: model(x(4, 4)))


def test_a_poisoned_row_in_the_first_batch_does_not_hide_the_axis():
    model = mlp()
    engine, poisoned = BookKeeping(model), x(4, 4)  # (T, R, E)
    poisoned[0, 0, 0] = math.nan
    found = engine(lambda: model(poisoned).sin().sum(0).square().sum(1), 0.5)
    assert torch.isfinite(found.norms).tolist() == [False, True, True, True]
    assert_exact(engine, model, lambda: model(x(4, 4)).sin().sum(0).square().sum(1))


@pytest.mark.parametrize("windows", [2, 3])
@pytest.mark.parametrize("what", ["conv bias", "conv", "group norm"])
def test_windows_of_images(what, windows):
    """(R * k, C, H, W), also where k == C."""
    torch.manual_seed(0)
    model = (nn.GroupNorm(1, 3) if "norm" in what else nn.Conv2d(3, 3, 2)).double()
    for p in model.parameters():
        p.data.normal_()
    model.weight.requires_grad_(what != "conv bias")
    data = torch.randn(4 * windows, 3, 4, 5, dtype=torch.float64)
    assert_exact(BookKeeping(model), model, lambda: model(data).sin().reshape(4, -1).square().sum(1))


def test_opacus_does_not_leave_a_functional_use_out():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    with pytest.raises(UnsupportedUse, match="gave no per-sample gradient, though it is used"):
        OpacusHooks(model)(lambda: F.linear(x(4), model[0].weight, model[0].bias).square().sum(1), 0.5)


def test_a_bias_whose_places_cancel_in_the_second_pass():
    worst = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Linear(16, 64).requires_grad_(False)
        model.bias.requires_grad_()
        data, weights = torch.randn(1, 64, 16), torch.randn(64, 64)
        weights = weights - weights.mean(0)
        for strength in (1e5, 1e6, 1e7):

            def losses(model=model, data=data, weights=weights, strength=strength):
                return strength * (model(data) * weights).flatten(1).sum(1)

            found = GhostTwoPass(model)(losses, 0.3)
            worst = max(worst, float(found.sums["bias"].norm()) / 0.3)
    assert worst <= 1 + 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_a_second_pass_in_bf16_is_refused(autocast):
    """PRIVACY line 27: it would round on its own, by up to 2^-8 of each part, beyond the clip norm."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).to(torch.float32 if autocast else torch.bfloat16)
    data = torch.randn(2, 4, 16).to(model[0].weight.dtype)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(UnsupportedUse, match=r"bfloat16|less than 32"),
    ):
        GhostTwoPass(model)(lambda: model(data).square().flatten(1).sum(1), 0.03)


def test_a_second_pass_through_a_frozen_half_precision_layer_is_refused():
    """PRIVACY lines 26 and 27: what is trained is float32, but its weighted gradient comes back through bfloat16."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.first(x).bfloat16()).float()

    model = Between()
    with pytest.raises(UnsupportedUse, match=r"frozen\.weight has less than 32 bits"):
        GhostTwoPass(model)(lambda: model(torch.ones(2, 4)).sum(1), 0.03)


def test_one_id_a_row():
    """(R,) ids of a table (a class, say) are not positions, though they look like them."""

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 6)
            self.double()

        def forward(self, data, ids):
            return self.head(F.linear(data, torch.eye(6).double()) + self.table(ids)).sin().flatten(1).square().sum(1)

    model, ids = Labelled(), torch.tensor([1, 2, 2, 0])
    assert_exact(BookKeeping(model), model, lambda: model(x(4), ids))
