"""Modules that make one example's output depend on others, refused by name."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from privzoo.errors import UserError
from privzoo.privacy.dropout import drops


def refuse_coupling_modules(model: nn.Module, longest: int | None = None) -> None:
    """Refuse modules whose output for one example depends on others, frozen or not, and dropout that cannot be keyed.

    The pre-flight's comparisons see a few rows; what these modules do may hang on rows that no run has seen yet.

    Args:
        longest: positions that a row may have at most; None: unknown.
    Raises:
        UserError: naming the module.
    """
    dropping = drops(model)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
            raise UserError(
                f"{name} is a {type(module).__name__}: its statistics mix examples, so no example's influence is bounded; "
                "replace it by GroupNorm or LayerNorm."
            )
        if isinstance(module, _DropoutNd) and type(module) is not nn.Dropout and module.p > 0:
            raise UserError(
                f"{name} is a {type(module).__name__} with p={module.p:g}, whose masks are not keyed by example: set it to "
                "0, or take nn.Dropout."
            )
        if dropping and getattr(module, "gradient_checkpointing", False):
            raise UserError(
                f"{type(module).__name__} computes its layers a second time for gradients, where dropout would have other "
                "masks: set trainer.gradient_checkpointing=false, or model.dropout and an adapter's own to 0."
            )
        for limit in _lengths_at_which_positions_change(module):
            if longest is None or longest > limit:
                raise UserError(
                    f"{name} turns all rows of a batch by other angles where one is longer than {limit} positions "
                    f"(rope_type {module.rope_type}): set task.max_length={limit} or less, or take another model."
                )
        if getattr(module, "attention_type", None) == "block_sparse":
            raise UserError(
                f"{name} attends to blocks, and for good to everything once it has seen a short batch: set "
                "attention_type to original_full in the model's config.json."
            )


def _lengths_at_which_positions_change(module: Any) -> Iterator[int]:
    """Of rotary embeddings that choose frequencies by the longest row that they see (transformers' dynamic, longrope)."""
    kinds = getattr(module, "rope_type", None)
    by_layer: dict[Any, Any] = kinds if isinstance(kinds, dict) else {None: kinds}
    for layer, kind in by_layer.items():
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            parameters = module.config.rope_parameters if layer is None else module.config.rope_parameters[layer]
            yield int(parameters.get("original_max_position_embeddings") or module.original_max_seq_len)
