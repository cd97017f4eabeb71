"""Which parameters a method trains."""

import re
from collections.abc import Collection

from torch import nn

from privzoo.errors import UserError


def select_trainable(model: nn.Module, pattern: str, new_head: Collection[str]) -> dict[str, nn.Parameter]:
    """Freezes all parameters but the chosen ones and returns those by name.

    Args:
        model: changed in place (`requires_grad`).
        pattern: "all"; "biases" (every bias of the pretrained part, and the new head); else a regular expression that is
            searched for in parameter names, with the new head always added.
        new_head: names of freshly initialised parameters, which must learn whatever the method.
    Raises:
        UserError: if the choice is empty but for the head, or the pattern is no regular expression.
    """
    chosen = {name for name, _ in model.named_parameters() if _matches(name, pattern)}
    if not chosen - set(new_head):
        architecture = type(model).__name__
        way_out = (
            "it has none; take method=dp_full"
            if pattern == "biases"
            else "parameter names are like " + ", ".join(name for name, _ in list(model.named_parameters())[:2])
        )
        raise UserError(f"trainable={pattern} chooses nothing of the pretrained {architecture}: {way_out}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name in new_head)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _matches(name: str, pattern: str) -> bool:
    if pattern == "all":
        return True
    if pattern == "biases":
        return name.rpartition(".")[2].endswith("bias")
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"trainable={pattern} is not a regular expression: {error}.") from None
