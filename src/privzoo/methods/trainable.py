"""Which parameters a method trains."""

import re
from collections.abc import Collection
from itertools import islice

from torch import nn

from privzoo.errors import UserError


def select_trainable(model: nn.Module, pattern: str, new_head: Collection[str]) -> dict[str, nn.Parameter]:
    """Freezes all parameters but the chosen ones and returns those by name.

    Args:
        model: changed in place (`requires_grad`).
        pattern: "all"; "floats" (all but quantised weights, which cannot move); "biases" (every bias of the pretrained part,
            and the new head); "adapter" (what an adapter added, and the new head); "head" (the new head alone; without one,
            what lies outside the pretrained body); else a regular expression that is searched for in parameter names, with
            the new head always added.
        new_head: names of freshly initialised parameters, which must learn whatever the method.
    Raises:
        UserError: if the choice is empty (for all but "head": empty but for the head) or holds quantised weights, or the
            pattern is no regular expression.
    """
    if pattern == "adapter":
        chosen = (
            {name for name, p in model.named_parameters() if p.requires_grad} if hasattr(model, "peft_config") else set()
        )
    elif pattern == "head":
        chosen = set(new_head) or _outside_the_body(model)
    else:
        chosen = {name for name, p in model.named_parameters() if _matches(name, p, pattern)}
    if not chosen - (set() if pattern == "head" else set(new_head)):
        names = [name for name, _ in islice(model.named_parameters(), 2)]
        way_out = _WAY_OUT.get(pattern, "parameter names are like " + ", ".join(names))
        raise UserError(f"trainable={pattern} chooses nothing of the pretrained {type(model).__name__}: {way_out}.")
    for name, parameter in model.named_parameters():
        if name in chosen and not parameter.is_floating_point():
            raise UserError(
                f"trainable={pattern} chooses {name}, which holds whole numbers of {parameter.dtype}: a quantised base is "
                "not trained itself; take method=dp_qlora, or model.quantization=null; trainable=floats trains the rest."
            )
        parameter.requires_grad_(name in chosen or name in new_head)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


_WAY_OUT = {
    "biases": "it has none; add some with method.add_bias=true, or take method=dp_lora",
    "adapter": "it has no adapter; take method=dp_lora",
    "head": "its output shares its weights with the body; take method=dp_lora or dp_bitfit",
}


def _outside_the_body(model: nn.Module) -> set[str]:
    body = getattr(model, "base_model_prefix", None)
    if not body:
        return set()
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{body}.")}


def _matches(name: str, parameter: nn.Parameter, pattern: str) -> bool:
    if pattern in ("all", "floats"):
        return pattern == "all" or parameter.is_floating_point()
    if pattern == "biases":
        return name.rpartition(".")[2].endswith("bias")
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"trainable={pattern} is not a regular expression: {error}.") from None
