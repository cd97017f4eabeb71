"""Frozen weights dealt out to several processes (FSDP2): each holds a part of them, and a block's for as long as it computes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from privzoo.errors import UserError


def shard_frozen(model: nn.Module, trained: Iterable[nn.Parameter], device: torch.device, ranks: int) -> None:
    """Deal out what is not trained, block by block, and leave the trained part whole on every rank.

    Every rank has to make the same forward and backward passes afterwards, as weights come from all of them. What an engine
    sees of the trained parameters is what it sees without this.

    Args:
        model: whole on every rank, on any device; in place.
        trained: parameters that any phase trains.
        device: where this rank computes; a block at a time goes there, of which the part stays.
        ranks: how many processes have joined.
    Raises:
        UserError: if there is nothing to deal out, or it is quantised.
    """
    keep = set(trained)
    frozen = [p for p in model.parameters() if p not in keep]
    if sum(p.numel() for p in frozen) < sum(p.numel() for p in keep):
        raise UserError(
            "trainer.strategy=fsdp deals out frozen weights, and most weights of this method are trained: take "
            "trainer.strategy=replicas, or a method such as dp_lora."
        )
    if not all(p.is_floating_point() for p in frozen):
        raise UserError("trainer.strategy=fsdp cannot deal out a quantised model: take trainer.strategy=replicas.")
    mesh = init_device_mesh(device.type, (ranks,))
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    blocks = set(getattr(base, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=keep)
    fully_shard(model, mesh=mesh, ignored_params=keep)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every dealt-out tensor put together again, on the CPU; all ranks take part."""
    return {
        name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
