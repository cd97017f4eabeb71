"""A model dealt out to several processes: each holds a part, and with FSDP2 a whole block for as long as it computes."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor


class DealtOut:
    """A model of which each rank holds a part; all ranks have to make the same passes, as weights or sums come from all.

    An engine sees trained parameters as it would without this, whether they are whole on every rank or come in each pass.

    Args:
        model: what is dealt out.
        mesh: one dimension, of all ranks, of the kind of device on which they compute.
        home: of the kind of device where a rank's parts of trained parameters lie, and sums and optimizer state with them;
            None: the same.

    Attributes:
        parts: what a method trains, by name: of each parameter that is dealt out this rank's part.
        wholes: where an engine's sums are dealt out in each pass, what modules use of trained parameters then, by name.
            They are the same objects in every pass. Else empty.
        shapes: of trained parameters, in a pass.
        copied: trained parameters that every rank holds whole all the time, the same on all, while it trains a part.
        flat: whether parts of trained parameters are ranges of the flat tensor, whatever its shape.
        level: whether all ranks have to make the same passes.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, home: DeviceMesh | None = None) -> None:
        self.model, self.mesh, self.home = model, mesh, home or mesh
        self.own = True
        self.parts: dict[str, nn.Parameter] = {}
        self.wholes: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.copied: dict[str, nn.Parameter] = {}
        self.flat, self.level = False, True

    def some_part(self) -> nn.Parameter:
        """A parameter of zeros of which each rank holds some thousand values, as it does of those in `parts`."""
        local = torch.zeros(8192, device=self.home.device_type)
        return nn.Parameter(DTensor.from_local(local, self.home, [Shard(0)], run_check=False))

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
        value = (value if self.own else value.zero_()).reshape(self.parts[name].shape)
        total = DTensor.from_local(value, self.mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)])
        if self.home is not self.mesh:
            total = DTensor.from_local(
                total.to_local().to(self.home.device_type), self.home, [Shard(0)], run_check=False, shape=total.shape,
                stride=total.stride(),
            )  # fmt: skip
        sums[name] = sums[name].add_(total) if name in sums else total

    def passing(self) -> AbstractContextManager[None]:
        """Around the forward pass of an engine."""
        return nullcontext()

    def divided(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a release, in parts where they have not been dealt out yet; overwritten. All ranks take part."""
        return sums

    def spread(self) -> None:
        """After parts were changed: whole copies of them follow. All ranks take part."""

    def here(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of any parameter of the model."""
        return parameter

    def put(self, name: str, value: Tensor) -> None:
        """Let a trained parameter be `value`, which is whole and the same on every rank."""
        part = self.parts[name]
        part.data.copy_(part_like(value.reshape(part.shape), part))

    def state(self) -> dict[str, Tensor]:
        """The model's state dict with every tensor put together again, on the CPU; all ranks take part."""
        return {name: whole(value) for name, value in self.model.state_dict().items()}

    def whole_of(self, name: str) -> Tensor:
        """A trained parameter put together again, on the CPU; all ranks take part."""
        return whole(self.parts[name].detach()).reshape(self.shapes.get(name, self.parts[name].shape))


class Fsdp(DealtOut):
    """FSDP2, block by block: a rank's part are rows of a parameter.

    Args:
        model: whole on every rank, on any device; in place.
        trained: parameters that any phase trains, by name.
        whole: whether they stay whole on every rank; else they are dealt out, too.
        mesh: a block at a time goes to its device, of which the rank's part stays.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter], whole: bool, mesh: DeviceMesh) -> None:
        super().__init__(model, mesh)
        keep = set(trained.values()) if whole else set()
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for block in reversed([block for blocks in lists for block in blocks]):  # inner ones first
            fully_shard(block, mesh=mesh, ignored_params=keep)
        # The outermost part would stay whole after a pass without gradients, and miss what an update makes of it.
        fully_shard(model, mesh=mesh, ignored_params=keep, reshard_after_forward=True)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        self.wholes = {} if whole else self._wholes(trained)
        self.shapes = {name: parameter.shape for name, parameter in self.wholes.items()}
        parameters = dict(model.named_parameters())
        self.parts = {name: parameters[name] for name in trained}

    def _wholes(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for part in [module for module in self.model.modules() if isinstance(module, FSDPModule)]:
            part.unshard()
            here = {id(parameter) for parameter in part.parameters()}
            found |= {n: p for n, p in self.model.named_parameters() if id(p) in here and not isinstance(p, DTensor)}
            part.reshard()
        return {name: found[name] for name in trained}


def whole(value: Any) -> Any:
    """A dealt-out tensor put together again, on the CPU; all ranks take part. Anything else is what it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def part_like(value: Any, like: Any) -> Any:
    """A whole tensor, the same on every rank, dealt out as another of as many values is, and in its shape; anything else is
    what it is. A count of steps is a number of no dimension."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or not value.dim() or value.numel() != like.numel():
        return value
    on_device = value.reshape(like.shape).to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
