"""Engines side by side, and tiny transformers models to hold them against each other on."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from privzoo.privacy.clipping import BookKeeping, Loop

WIDTH = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.tensor([[5, 9, 3, 7, 2], [4, 6, 1, 1, 1], [8, 2, 2, 11, 1], [3, 10, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LABELS = torch.tensor([0, 2, 1, 2])


def bert():
    config = hf.BertConfig(
        vocab_size=13, max_position_embeddings=6, num_labels=3, initializer_range=0.3, **WIDTH, **NO_DROPOUT
    )
    return hf.BertForSequenceClassification(config)


def roberta():
    config = hf.RobertaConfig(vocab_size=13, max_position_embeddings=8, num_labels=3, pad_token_id=1,
                              initializer_range=0.3, **WIDTH, **NO_DROPOUT)  # fmt: skip
    return hf.RobertaForSequenceClassification(config)


def gpt2():
    config = hf.GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=6, resid_pdrop=0.0, embd_pdrop=0.0,
                           attn_pdrop=0.0, initializer_range=0.3, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def opt():
    config = hf.OPTConfig(vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12,
                          max_position_embeddings=6, word_embed_proj_dim=8, dropout=0.0, init_std=0.3)  # fmt: skip
    return hf.OPTForCausalLM(config)


def llama():
    config = hf.LlamaConfig(vocab_size=13, max_position_embeddings=6, num_key_value_heads=1, initializer_range=0.3, **WIDTH)
    return hf.LlamaForCausalLM(config)


def vit():
    config = hf.ViTConfig(image_size=6, patch_size=3, num_labels=3, initializer_range=0.3, **WIDTH, **NO_DROPOUT)
    return hf.ViTForImageClassification(config)


MODELS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "opt": opt, "llama": llama, "vit": vit}


@pytest.fixture
def transformer():
    """`transformer("gpt2")`: (float64 model, its losses of some of four rows of unequal length)."""

    def make(name, dtype=torch.float64, **config):
        torch.manual_seed(1)
        model = MODELS[name]().to(dtype)
        pixels = torch.randn(4, 3, 6, 6, dtype=dtype)

        def losses(rows=slice(None)):
            if name == "vit":
                return F.cross_entropy(model(pixel_values=pixels[rows]).logits, LABELS[rows], reduction="none")
            logits = model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits
            if logits.dim() == 2:
                return F.cross_entropy(logits, LABELS[rows], reduction="none")
            targets = IDS[rows, 1:].masked_fill(MASK[rows, 1:] == 0, -100)
            return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)

        return model, losses

    return make


@pytest.fixture
def agree():
    """`agree(model, forward)`: both engines give the same norms and sums, clipped (some units, not all) and unclipped.

    Returns the unclipped result of BookKeeping.
    """

    def check(model, forward, units=None, tolerance=1e-9):
        norms = Loop(model)(forward, math.inf, units).norms
        assert (norms > 0).any(), "the fixture has no gradient to compare"
        for clip_norm in (float(norms.mean()), math.inf):
            found, expected = (engine(model)(forward, clip_norm, units) for engine in (BookKeeping, Loop))
            torch.testing.assert_close(found.norms, expected.norms, rtol=tolerance, atol=0)
            torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
            assert found.sums.keys() == expected.sums.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
            scale = max(float(value.abs().max()) for value in expected.sums.values())
            for name, value in expected.sums.items():
                torch.testing.assert_close(
                    found.sums[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
                )
        return found

    return check
