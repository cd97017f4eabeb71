"""BookKeeping equals the definition on unpatched architectures of transformers."""

import math

import pytest
import torch

from privzoo.privacy.clipping import BookKeeping, Loop

ARCHITECTURES = ["BERT", "GPT-2", "OPT", "Llama", "ViT"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_loop_in_units_of_several_rows(name, transformer, agree):
    """PRIVACY line 37, engine's part: rows of a unit are summed before clipping; units come in any order."""
    model, losses = transformer(name)
    found = agree(model, losses, torch.tensor([2, 0, 1, 0]))
    assert len(found.norms) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_biases_alone(name, transformer, agree):
    """DP-BiTFiT's choice: frozen weights everywhere, biases trained (in Llama, which has none, the norms' weights)."""
    model, losses = transformer(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("norm.weight" if name == "Llama" else "bias"))
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


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
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


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
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


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_autocast_around_the_engine_is_that_of_the_model(name, transformer):
    """PRIVACY line 27: autocast reaches the forward pass alone; what the engine reckons with its results is not bf16."""
    model, losses = transformer(name, dtype=torch.float32)
    row = slice(0, 1)

    def cast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(row)

    expected = BookKeeping(model)(cast, math.inf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BookKeeping(model)(lambda: losses(row), math.inf)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=0, atol=1e-5 * float(expected.norms.max()))
