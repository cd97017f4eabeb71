"""4-bit bases: what is quantised, that it is never written, and the traps of bitsandbytes on a CPU."""

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F

from privzoo.errors import UserError
from privzoo.models.adapters import merge, wrap
from privzoo.models.checkpointing import turn_on_checkpointing
from privzoo.models.loading import load
from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.privacy.noise import fingerprint

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
IDS, LABELS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [4, 4, 5, 9]]), torch.tensor([0, 1, 1])


@pytest.fixture
def quantized():
    loaded = load("tiny_encoder", "sequence_classification", num_labels=2, quantization="nf4")
    model, _ = wrap(loaded.model, loaded.new_head, partial(peft.LoraConfig, r=2, lora_alpha=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def losses(model):
    return F.cross_entropy(model(input_ids=IDS).logits.float(), LABELS, reduction="none")


def test_the_body_is_in_4_bits_twice_quantised_and_the_rest_is_not(quantized):
    layers = [m for m in quantized.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 12  # two blocks of six linear layers
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16
        assert layer.support_avx512bf16_for_cpu is False
    own = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    assert {p.dtype for p in quantized.parameters() if id(p) not in own} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_engine_equals_the_loop_on_a_4_bit_base(quantized, checkpointing):
    """PRIVACY line 26: only the adapter and the head have gradients."""
    if checkpointing:
        turn_on_checkpointing(quantized.base_model.model)
    expected = Loop(quantized)(lambda: losses(quantized), 0.5)
    found = BookKeeping(quantized)(lambda: losses(quantized), 0.5)
    trained = {name for name, p in quantized.named_parameters() if p.requires_grad}
    assert found.sums.keys() == expected.sums.keys() == trained
    assert all(("lora_" in name) or ("modules_to_save" in name) for name in trained)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=1e-5)
    assert all(value.any() for value in found.sums.values())


def test_gradients_outlive_a_validation(quantized):
    """bitsandbytes packs the weights anew at an evaluation without gradients, and no gradient came through afterwards."""
    before = BookKeeping(quantized)(lambda: losses(quantized), 0.5).sums
    quantized.eval()
    with torch.no_grad():
        losses(quantized)
    quantized.train()
    after = BookKeeping(quantized)(lambda: losses(quantized), 0.5).sums
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_base_is_never_written(quantized):
    base = {name: p for name, p in quantized.named_parameters() if not p.requires_grad}
    bytes_before = fingerprint(base.items())
    optimizer = torch.optim.AdamW([p for p in quantized.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        losses(quantized).sum().backward()
        optimizer.step()
    assert fingerprint(base.items()) == bytes_before
    assert any(p.dtype == torch.uint8 for p in base.values())


def test_merged_into_a_base_of_full_precision(quantized, tmp_path):
    """What comes out is the full-precision base with the adapter, not 4-bit weights rounded back."""
    quantized.eval().save_pretrained(tmp_path)
    merged = merge(load("tiny_encoder", "sequence_classification", num_labels=2).model, tmp_path).eval()
    plain = load("tiny_encoder", "sequence_classification", num_labels=2).model
    state, own = merged.state_dict(), plain.state_dict()
    key = "bert.encoder.layer.0.attention.self.key.weight"
    assert torch.equal(state[key], own[key])
    query = "bert.encoder.layer.0.attention.self.query"
    factors = quantized.base_model.model.get_submodule(query)
    delta = 2 * factors.lora_B["default"].weight @ factors.lora_A["default"].weight  # alpha / r = 2
    torch.testing.assert_close(state[f"{query}.weight"] - own[f"{query}.weight"], delta, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"Unknown quantization='int3': expected model\.quantization=nf4 or null"):
        load("tiny_encoder", "sequence_classification", quantization="int3")


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'privzoo\[quantization\]'"):
        load("tiny_encoder", "sequence_classification", quantization="nf4")
