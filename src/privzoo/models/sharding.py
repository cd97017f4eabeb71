"""Frozen weights dealt out to several processes (FSDP2): each holds a part, and a whole block for as long as it computes."""

from collections.abc import Callable, Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from privzoo.errors import UserError


def shard_frozen(model: nn.Module, trained: Iterable[nn.Parameter], device: torch.device, ranks: int) -> Callable[[], None]:
    """Deal out what is not trained, block by block, and leave the trained part whole on every rank.

    Every rank has to make the same forward and backward passes afterwards, as weights come from all of them. What an engine
    sees of the trained parameters is what it sees without this.

    Args:
        model: whole on every rank, on any device; in place.
        trained: parameters that any phase trains.
        device: where this rank computes; a block at a time goes there, of which its part stays.
        ranks: how many processes have joined.
    Returns:
        A function after which this rank holds no more than its part; between passes it may still hold what lies outside of
        blocks.
    Raises:
        UserError: if there is little to deal out, or it is quantised.
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
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in reversed([block for blocks in lists for block in blocks]):  # inner ones first
        fully_shard(block, mesh=mesh, ignored_params=keep)
    fully_shard(model, mesh=mesh, ignored_params=keep)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")

    def settle() -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return settle


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict with every dealt-out tensor put together again, on the CPU; all ranks take part.

    None for an adapter, which is whole on every rank and saved without its base.
    """
    if isinstance(model, PeftModel):
        return None
    return {
        name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
