"""Gradient checkpointing of a pretrained model."""

from torch import nn

from privzoo.errors import UserError


def turn_on_checkpointing(model: nn.Module) -> None:
    """Activations are computed a second time in the backward pass instead of kept; gradients are the same.

    Not the reentrant kind, which loses every gradient behind a frozen embedding.

    Raises:
        UserError: if the architecture has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} has no gradient checkpointing: set trainer.gradient_checkpointing=false.")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
