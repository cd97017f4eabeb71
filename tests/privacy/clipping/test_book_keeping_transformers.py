"""BookKeeping equals the definition on unpatched architectures of transformers."""

import math

import pytest
import torch

from privzoo.privacy.clipping import BookKeeping, Loop

ARCHITECTURES = ["bert", "roberta", "gpt2", "opt", "llama", "vit"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_loop(name, transformer, agree):
    """PRIVACY line 14 (GPT-2 and OPT are tied) and the engine's promise: every parameter, float64, to 1e-9."""
    model, losses = transformer(name)
    found = agree(model, losses)
    assert len(found.norms) == 4
    assert sum(bool(value.any()) for value in found.sums.values()) >= len(found.sums) - 2  # no tensor is left out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_loop_in_units_of_several_rows(name, transformer, agree):
    """PRIVACY line 37, engine's part: rows of a unit are summed before clipping; units come in any order."""
    model, losses = transformer(name)
    found = agree(model, losses, torch.tensor([2, 0, 1, 0]))
    assert len(found.norms) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_is_within_rounding(name, transformer, agree):
    model, losses = transformer(name, dtype=torch.float32)
    agree(model, losses, tolerance=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_biases_alone(name, transformer, agree):
    """DP-BiTFiT's choice: frozen weights everywhere, biases trained (in Llama, which has none, the norms' weights)."""
    model, losses = transformer(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("norm.weight" if name == "llama" else "bias"))
    agree(model, losses)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_micro_batches_add_up_to_one_batch(name, transformer):
    """PRIVACY line 11, engine's part: `into` accumulates, so that cutting the batch changes nothing."""
    model, losses = transformer(name)
    engine = BookKeeping(model)
    clip_norm = float(engine(losses, math.inf).norms.mean())
    whole, sums, norms = engine(losses, clip_norm), None, []
    for rows in (slice(0, 1), slice(1, 4)):
        part = engine(lambda rows=rows: losses(rows), clip_norm, into=sums)
        assert sums is None or part.sums is sums
        sums = part.sums
        norms.append(part.norms)
    torch.testing.assert_close(torch.cat(norms), whole.norms, rtol=1e-10, atol=0)
    torch.testing.assert_close(sums, whole.sums, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_the_same_dropout_masks(name, transformer):
    """PRIVACY line 28: there is one forward pass, so norms and sums are of the same masks, the seed's."""
    model, losses = transformer(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()

    def seeded():
        torch.manual_seed(3)
        return losses()

    assert not torch.equal(seeded(), losses())  # dropout is on
    found, expected = BookKeeping(model)(seeded, 0.5), Loop(model)(seeded, 0.5)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_contributions_in_bf16_autocast_stay_within_the_clip_norm(name, transformer):
    """PRIVACY line 27: norms and factors are reckoned in float32, whatever autocast says around the engine."""
    model, losses = transformer(name, dtype=torch.float32)
    for row in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = BookKeeping(model)(lambda row=row: losses(slice(row, row + 1)), clip_norm=1e-3)
        assert found.norms.item() > 1e-3
        assert {value.dtype for value in found.sums.values()} == {torch.float32}
        length = torch.sqrt(sum(value.double().square().sum() for value in found.sums.values()))
        assert 0.999 < length.item() / 1e-3 < 1 + 1e-5
