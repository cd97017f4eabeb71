"""A base in 4 bits: NF4 with double quantisation, by bitsandbytes (Dettmers et al. 2023, QLoRA)."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from privzoo.errors import UserError

KINDS = ("nf4",)
# Heads are drawn afresh or tied to the embeddings, and small: they stay as they are, as do norms and embeddings.
HEADS = ("lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "pooler.dense")


def quantization_options(quantization: str | None) -> dict[str, Any]:
    """Keywords of `from_pretrained`; none without quantisation.

    Raises:
        UserError: for an unknown kind, or if bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    if quantization not in KINDS:
        raise UserError(f"Unknown quantization={quantization!r}: expected model.quantization=nf4 or null.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization=nf4 needs bitsandbytes: pip install 'privzoo[quantization]'.")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(HEADS),
    )  # fmt: skip
    return {"quantization_config": config}


def keep_quantized_weights(model: nn.Module) -> int:
    """Sees to it that no forward pass writes to a 4-bit model; returns how many layers are quantised.

    On CPUs with avx512_bf16, bitsandbytes packs the weights anew at the first forward pass in evaluation mode; from then on
    every gradient that passes through them is lost, without an error, and merging gives wrong weights. And each layer rounds
    its bias to the compute type when it is first run; here this is done at once.
    """
    import bitsandbytes

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)
    return len(layers)
