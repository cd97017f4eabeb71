"""Adapters of peft: small trainable parameters in a frozen model, saved and loaded in peft's own format."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from privzoo.errors import UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
# What the projections to query and value are called; the first of which a model has all. GPT-2, GPT-NeoX and BLOOM have one
# projection for query, key and value together.
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("q", "v"), ("q_lin", "v_lin"), ("c_attn",),
    ("query_key_value",), ("qkv",), ("qkv_proj",),
)  # fmt: skip


def wrap(
    model: PreTrainedModel,
    new_head: tuple[str, ...],
    tuner: Callable[..., PeftConfig],
    targets: str | list[str] | None = None,
    seed: int = 0,
) -> tuple[PeftModel, tuple[str, ...]]:
    """The model with an adapter; all else is frozen, but for a freshly drawn head, which is trained and saved with it.

    The adapter is drawn from a generator of its own: it hangs on `seed` alone, and the global generator is left as it was.

    Args:
        new_head: names of freshly initialised parameters.
        tuner: partial of a configuration of peft (`peft.LoraConfig`, …).
        targets: modules that get one: endings of their names, or a regular expression for the whole name; None takes the
            attention's query and value.
    Returns:
        The model, and the names that the new head has in it.
    Raises:
        UserError: if the targets name nothing, or peft refuses the model.
    """
    chosen = targets if targets is not None else query_and_value(model)
    heads = sorted({_module_of(name, model.base_model_prefix) for name in new_head})
    options: dict[str, Any] = {"target_modules": chosen, "modules_to_save": heads or None}
    if model.can_generate():
        options["task_type"] = TaskType.CAUSAL_LM
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, tuner(**options))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"peft cannot adapt {type(model).__name__} so: {first_line(error)}.") from None
    assert isinstance(adapted, PeftModel)
    return adapted, tuple(name for name, _ in adapted.named_parameters() if ".modules_to_save." in name)


def query_and_value(model: nn.Module) -> list[str]:
    """Endings of the names of the attention's query and value projections.

    Raises:
        UserError: if the model calls them otherwise.
    """
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in QUERY_AND_VALUE:
        if found.issuperset(names):
            return list(names)
    raise UserError(
        f"The attention of {type(model).__name__} is not known here: name the modules to adapt, as in "
        "'method.adapter.targets=[q_proj,v_proj]'."
    )


def add_biases(
    model: PreTrainedModel, new_head: tuple[str, ...], tuner: Callable[..., PeftConfig]
) -> tuple[PeftModel, tuple[str, ...]]:
    """The model with a bias, 0 at first, on every linear layer of its body that has none (BiTFiT-Add, Bu et al. 2022).

    It is made of peft's LoRA with `lora_bias`: of the rank-1 factors the second is 0 and neither is trained. So what is
    saved is an adapter that peft loads, whatever the architecture's own configuration knows of biases.

    Args:
        tuner: partial of `peft.LoraConfig` with `r=1, lora_bias=True`.
    Raises:
        UserError: if every linear layer has a bias already.
    """
    output, heads = model.get_output_embeddings(), {name.rpartition(".")[0] for name in new_head}
    without = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is None and module is not output and name not in heads
    ]
    if not without:
        raise UserError(f"Every linear layer of {type(model).__name__} has a bias: leave method.add_bias=false.")
    return wrap(model, new_head, tuner, f"({'|'.join(map(re.escape, without))})")


def _module_of(name: str, body: str) -> str:
    """The module that is saved whole for a parameter of the new head: all of the head, or a layer within the body."""
    return name.rpartition(".")[0] if name.startswith(f"{body}.") else name.partition(".")[0]


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter that was saved in a folder, frozen.

    Raises:
        UserError: if it was made for another model.
    """
    try:
        return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"The adapter in {folder} does not fit the model: {first_line(error)}.") from error


def merge(model: PreTrainedModel, folder: Path) -> nn.Module:
    """A model of full precision into which the adapter in a folder was merged, as transformers saves and loads it.

    Args:
        model: the base, loaded anew without quantisation: merging into 4-bit weights would round them a second time.
    """
    return load_adapter(model, folder).merge_and_unload(safe_merge=True)
