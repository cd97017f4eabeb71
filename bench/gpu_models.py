"""The architectures of the GPU benchmark with random weights, at their real sizes or tiny ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn


@dataclass
class Case:
    """A model and its losses of some of `rows` rows, under bfloat16 autocast if `half`."""

    model: nn.Module
    losses: Callable[..., Tensor]
    rows: int


def roberta_large(method: str, rows: int, length: int, tiny: bool, device: torch.device, half: bool = True) -> Case:
    """RoBERTa-large (24 layers, width 1024) with a head of two classes; positions up to 1,024."""
    size = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
        if tiny else
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
         "vocab_size": 50265}
    )  # fmt: skip
    length = min(length, 16) if tiny else length
    config = hf.RobertaConfig(**size, max_position_embeddings=1026, num_labels=2, hidden_dropout_prob=0.0,
                              attention_probs_dropout_prob=0.0, type_vocab_size=1)  # fmt: skip
    model = made(lambda: hf.RobertaForSequenceClassification(config), device)
    freeze(model, method)
    ids = torch.randint(3, size["vocab_size"], (rows, length), device=device)
    labels = torch.randint(0, 2, (rows,), device=device)
    positions = torch.arange(2, length + 2, device=device).repeat(rows, 1)

    def logits(part: slice) -> Tensor:
        return model(input_ids=ids[part], attention_mask=torch.ones_like(ids[part]), position_ids=positions[part]).logits

    return Case(model, classified(logits, labels, device, half), rows)


def vit_large(method: str, rows: int, side: int, tiny: bool, device: torch.device, half: bool = True) -> Case:
    """ViT-large with patches of 16 pixels."""
    size = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        if tiny else {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    )  # fmt: skip
    side = 32 if tiny else side
    config = hf.ViTConfig(**size, image_size=side, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = made(lambda: hf.ViTForImageClassification(config), device)
    freeze(model, method)
    images, labels = torch.randn(rows, 3, side, side, device=device), torch.randint(0, 10, (rows,), device=device)
    return Case(model, classified(lambda part: model(pixel_values=images[part]).logits, labels, device, half), rows)


def gpt2_large(method: str, rows: int, length: int, tiny: bool, device: torch.device, half: bool = True) -> Case:
    """GPT-2 large (36 layers, width 1280), embeddings tied to the head."""
    size = (
        {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 99}
        if tiny
        else {"n_layer": 36, "n_embd": 1280, "n_head": 20}
    )
    config = hf.GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = made(lambda: hf.GPT2LMHeadModel(config), device)
    freeze(model, method)
    return causal(model, rows, min(length, 16) if tiny else length, config.vocab_size, device, half)


def mistral_7b(method: str, rows: int, length: int, tiny: bool, device: torch.device, half: bool = True) -> Case:
    """Mistral-7B in 4 bits (NF4, doubly quantised), with LoRA factors of rank 16 on all of attention."""
    from peft import LoraConfig, get_peft_model

    size = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99}
        if tiny else {}
    )  # fmt: skip
    config = hf.MistralConfig(**size, sliding_window=None)
    model: Any = made(lambda: hf.MistralForCausalLM(config), device, torch.bfloat16)
    in_four_bits(model.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return causal(model, rows, min(length, 16) if tiny else length, config.vocab_size, device, half)


def opt_6_7b(method: str, rows: int, length: int, tiny: bool, device: torch.device, half: bool = True) -> Case:
    """OPT-6.7B in bfloat16."""
    size = (
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
         "word_embed_proj_dim": 32}
        if tiny else
        {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
         "word_embed_proj_dim": 4096}
    )  # fmt: skip
    config = hf.OPTConfig(**size, dropout=0.0)
    model = made(lambda: hf.OPTForCausalLM(config), device, torch.bfloat16)
    return causal(model, rows, min(length, 16) if tiny else length, config.vocab_size, device, half)


MODELS: dict[str, Callable[..., Case]] = {
    "roberta_large": roberta_large, "gpt2_large": gpt2_large, "mistral_7b": mistral_7b, "opt_6_7b": opt_6_7b,
    "vit_large": vit_large,
}  # fmt: skip


def made(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Drawn on the device itself: on a CPU billions of weights would take minutes."""
    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().train()
    finally:
        torch.set_default_dtype(former)


def in_four_bits(body: nn.Module) -> None:
    """Every linear layer of the body, in place."""
    import bitsandbytes as bnb

    for module in list(body.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                device = layer.weight.device
                small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16,
                                          quant_type="nf4", device="meta")  # fmt: skip
                small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                small.bias = layer.bias
                setattr(module, name, small.to(device))


def freeze(model: nn.Module, method: str) -> None:
    if method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))


def classified(logits: Callable[[slice], Tensor], labels: Tensor, device: torch.device, half: bool) -> Callable[..., Tensor]:
    def losses(part: slice = slice(None)) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found = logits(part)
        return F.cross_entropy(found.float(), labels[part], reduction="none")

    return losses


def causal(model: nn.Module, rows: int, length: int, vocabulary: int, device: torch.device, half: bool) -> Case:
    ids = torch.randint(0, vocabulary, (rows, length), device=device)
    positions = torch.arange(length, device=device).expand(rows, length)

    def losses(part: slice = slice(None)) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out: Any = model(input_ids=ids[part], position_ids=positions[part], use_cache=False)
        logits = out.logits[:, :-1].transpose(1, 2).float()
        return F.cross_entropy(logits, ids[part, 1:], reduction="none").mean(1)

    return Case(model, losses, rows)
