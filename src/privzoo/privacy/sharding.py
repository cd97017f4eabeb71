"""A model dealt out to several processes (FSDP2): each holds a part, and a whole block for as long as it computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from privzoo.errors import UserError


class DealtOut:
    """A model of which each rank holds a part; all ranks have to make the same passes, as weights come from all of them.

    An engine sees trained parameters as it would without this, whether they are whole on every rank or come in each pass.

    Args:
        model: whole on every rank, on any device; in place.
        trained: parameters that any phase trains, by name.
        whole: whether they stay whole on every rank; else they are dealt out, too.
        mesh: one dimension, of all ranks; a block at a time goes to its device, of which the rank's part stays.

    Attributes:
        wholes: of trained parameters that are dealt out what modules use in a pass, by name. They are the same objects
            in every pass, and empty between passes.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], whole: bool, mesh: DeviceMesh) -> None:
        self.model, self.mesh = model, mesh
        self.own = True
        keep = set(trained.values()) if whole else set()
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for block in reversed([block for blocks in lists for block in blocks]):  # inner ones first
            fully_shard(block, mesh=mesh, ignored_params=keep)
        # The outermost part would stay whole after a pass without gradients, and miss what an update makes of it.
        fully_shard(model, mesh=mesh, ignored_params=keep, reshard_after_forward=True)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        self.wholes = {} if whole else self._wholes(trained)

    def _wholes(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for part in [module for module in self.model.modules() if isinstance(module, FSDPModule)]:
            part.unshard()
            here = {id(parameter) for parameter in part.parameters()}
            found |= {n: p for n, p in self.model.named_parameters() if id(p) in here and not isinstance(p, DTensor)}
            part.reshard()
        return {name: found[name] for name in trained}

    @contextmanager
    def without_own(self) -> Iterator[None]:
        """Meanwhile what this rank adds up counts as 0; what others add to its part counts."""
        self.own = False
        try:
            yield
        finally:
            self.own = True

    def add(self, sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Add up a sum over all ranks, of which each keeps its part in `sums`: all call this with the same names in the
        same order.

        Args:
            value: this rank's, whole; overwritten.
        """
        value = value if self.own else value.zero_()
        total = DTensor.from_local(value, self.mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)])
        sums[name] = sums[name].add_(total) if name in sums else total


def deal_out(
    model: nn.Module, trained: Mapping[str, nn.Parameter], whole: bool, device: torch.device, ranks: int
) -> DealtOut:
    """Deal a model out to all ranks, which have joined one another.

    Args:
        device: where this rank computes.
        rest: see `DealtOut`.
    Raises:
        UserError: if more is trained than frozen, and what is frozen is quantised.
    """
    if not whole and not all(p.is_floating_point() for p in model.parameters()):
        raise UserError(
            "trainer.strategy=fsdp cannot deal out what is trained beside quantised weights: take trainer.strategy=replicas "
            "or a method that trains less, such as dp_qlora."
        )
    for module in model.modules():
        scales = getattr(module, "quant_state", None)  # of 4-bit weights; they stay whole, and nothing else moves them
        if scales is not None:
            scales.to(device)
    return DealtOut(model, trained, whole, init_device_mesh(device.type, (ranks,)))


def whole(value: Any) -> Any:
    """A dealt-out tensor put together again, on the CPU; all ranks take part. Anything else is what it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def part_like(value: Any, like: Any) -> Any:
    """A whole tensor, the same on every rank, dealt out as another of its shape is; anything else is what it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    on_device = value.to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
