"""Tiny models of the architectures that the engine is held against, unpatched but for their size; read with runpy."""

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

WIDTH = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": 13, "max_position_embeddings": 8, "num_labels": 3, "initializer_range": 0.3}
CAUSAL = {"vocab_size": 13, "max_position_embeddings": 6, "initializer_range": 0.3}
IMAGE = {"num_labels": 3, "initializer_range": 0.3}
IDS = torch.tensor([[5, 9, 3, 7, 2], [4, 6, 1, 1, 1], [8, 2, 2, 11, 1], [3, 10, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
LABELS = torch.tensor([0, 2, 1, 2])


def gpt2():
    config = hf.GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=6, resid_pdrop=0.0, embd_pdrop=0.0,
                           attn_pdrop=0.0, initializer_range=0.3, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def opt():
    config = hf.OPTConfig(vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12,
                          max_position_embeddings=6, word_embed_proj_dim=8, dropout=0.0, init_std=0.3)  # fmt: skip
    return hf.OPTForCausalLM(config)


def bloom():
    config = hf.BloomConfig(vocab_size=13, hidden_size=8, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0,
                            initializer_range=0.3)  # fmt: skip
    return hf.BloomForCausalLM(config)


def gpt_neox():
    config = hf.GPTNeoXConfig(**CAUSAL, **WIDTH, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    return hf.GPTNeoXForCausalLM(config)


def llama_like(name, **options):
    config = getattr(hf, f"{name}Config")(**CAUSAL, **WIDTH, num_key_value_heads=1, pad_token_id=1, **options)
    return getattr(hf, f"{name}ForCausalLM")(config)


def t5():
    config = hf.T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0,
                         initializer_factor=0.3, decoder_start_token_id=0, pad_token_id=1,
                         relative_attention_num_buckets=4)  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def swin():
    config = hf.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=2,
                           drop_path_rate=0.0, **NO_DROPOUT, **IMAGE)  # fmt: skip
    return hf.SwinForImageClassification(config)


def convnext():
    config = hf.ConvNextConfig(patch_size=2, num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], layer_scale_init_value=0.5,
                               drop_path_rate=0.0, **IMAGE)  # fmt: skip
    return hf.ConvNextForImageClassification(config)


def resnet_with_group_norm():
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = hf.ResNetForImageClassification(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(2, child.num_features))
    return model


MODELS = {
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **WIDTH, **NO_DROPOUT)),
    "RoBERTa": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**TEXT, pad_token_id=1, **WIDTH, **NO_DROPOUT)
    ),
    "DeBERTa-v2": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**TEXT, **WIDTH, **NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"],
                           position_biased_input=False, pooler_dropout=0.0)
    ),
    "ELECTRA": lambda: hf.ElectraForSequenceClassification(
        hf.ElectraConfig(**TEXT, **WIDTH, **NO_DROPOUT, embedding_size=6, classifier_dropout=0.0)
    ),
    "GPT-2": gpt2,
    "OPT": opt,
    "GPT-NeoX": gpt_neox,
    "BLOOM": bloom,
    "Llama": lambda: llama_like("Llama"),
    "Mistral": lambda: llama_like("Mistral"),
    "Qwen2": lambda: llama_like("Qwen2"),
    "Gemma": lambda: llama_like("Gemma", head_dim=4),
    "T5": t5,
    "ViT": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(image_size=8, patch_size=4, **IMAGE, **WIDTH, **NO_DROPOUT)
    ),
    "BEiT": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(image_size=8, patch_size=4, use_relative_position_bias=True, layer_scale_init_value=0.5,
                      drop_path_rate=0.0, **IMAGE, **WIDTH, **NO_DROPOUT)
    ),
    "Swin": swin,
    "ConvNeXt": convnext,
    "ResNet with GroupNorm": resnet_with_group_norm,
}  # fmt: skip


def model_and_losses(name, dtype=torch.float64):
    """(model, its losses of some of four rows of unequal length)."""
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    for parameter in model.parameters():  # nothing may be hidden behind a gate or a bias that starts from 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    pixels = torch.randn(4, 3, 8, 8, dtype=dtype)

    def losses(rows=slice(None)):
        if "pixel_values" in model.main_input_name:
            return F.cross_entropy(model(pixel_values=pixels[rows]).logits, LABELS[rows], reduction="none")
        more = {"decoder_input_ids": IDS[rows]} if name == "T5" else {}
        logits = (
            model(input_ids=IDS[rows], attention_mask=MASK[rows], use_cache=False, **more).logits
            if "use_cache" in model.config.to_dict() or more
            else model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits
        )
        if logits.dim() == 2:
            return F.cross_entropy(logits, LABELS[rows], reduction="none")
        targets = IDS[rows, 1:].masked_fill(MASK[rows, 1:] == 0, -100)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)

    return model, losses
