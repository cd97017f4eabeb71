"""A model dealt out as ZeRO does: of every tensor, laid out flat, a rank holds one range.

`Zero2` deals out what is made of trained parameters (sums, noise, the optimizer's state); `Zero3` the weights as well, of
which DeepSpeed brings a module's together for as long as it computes.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from privzoo.privacy.sharding import DealtOut


class Zero2(DealtOut):
    """ZeRO-1 and -2: a rank holds all weights, and moves its range of trained ones; then ranks tell one another.

    Nothing of it needs DeepSpeed, whose ZeRO-2 adds up gradients in hooks of the backward pass, unclipped as they are there.
    Of clipped sums there is a reduce-scatter to make, and after the step an all-gather.

    Args:
        model: on the device where this rank computes; in place.
        trained: parameters that any phase trains, by name.
        mesh, home: see `DealtOut`.
        whole_sums: ZeRO-1: each rank adds up its own sum whole, which is dealt out once a release; else in every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        mesh: DeviceMesh,
        home: DeviceMesh | None = None,
        whole_sums: bool = False,
    ) -> None:
        super().__init__(model, mesh, home)
        for parameter in trained.values():
            parameter.data = parameter.data.contiguous()  # a range is one of the flat view
        self.flat, self.level, self.copied = True, not whole_sums, dict(trained)
        self.wholes = {} if whole_sums else dict(trained)
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        self.parts = {name: _part(p.data.view(-1), p.numel(), self.home, offset=None) for name, p in trained.items()}

    def divided(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `DealtOut.divided`."""
        found: dict[str, Tensor] = {}
        for name in list(sums):
            value = sums.pop(name)
            if name in self.parts and not isinstance(value, DTensor):
                self.add(found, name, value)
            else:
                found[name] = value
        return found

    @torch.no_grad()
    def spread(self) -> None:
        """See `DealtOut.spread`."""
        parts: dict[str, Any] = dict(self.parts)
        for name, part in parts.items():
            self.copied[name].copy_(part.full_tensor().view(self.shapes[name]))

    def put(self, name: str, value: Tensor) -> None:
        """See `DealtOut.put`."""
        super().put(name, value)
        with torch.no_grad():
            self.copied[name].copy_(value)


class Zero3(DealtOut):
    """DeepSpeed's ZeRO-3, of which no optimizer is asked: clipped sums and noise are ours, and go to this rank's ranges.

    Args:
        model: whole on every rank; in place.
        trained: parameters that any phase trains, by name. (They cannot stay whole: DeepSpeed lets go of any at times.)
        mesh, home: see `DealtOut`; frozen weights lie where trained ones do.
    """

    def __init__(
        self, model: nn.Module, trained: Mapping[str, nn.Parameter], mesh: DeviceMesh, home: DeviceMesh | None = None
    ) -> None:
        super().__init__(model, mesh, home)
        self.flat, self.wholes = True, dict(trained)
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        _deal_by_deepspeed(model, mesh.device_type, offload=self.home is not mesh)
        # What no gradient goes through stays gathered after a pass, and would miss what an update makes of it.
        model.register_forward_pre_hook(lambda *_: self.rest(), prepend=True)
        for parameter in trained.values():
            parameter.requires_grad_(False)  # engines see its uses; autograd would keep what was gathered for a pass
        self._used: dict[int, list[Any]] = {}  # parameters by the storage in which they were gathered last
        for module in model.modules():
            own: list[Any] = list(module.parameters(recurse=False))
            if own:
                module.register_forward_pre_hook(lambda *_, own=own: self._note(own))
        parts: dict[str, Any] = dict(trained)
        self.parts = {name: _part(p.ds_tensor.data, p.ds_numel, self.home, offset=0) for name, p in parts.items()}

    def _note(self, gathered: list[Any]) -> None:
        for parameter in gathered:
            self._used.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """See `DealtOut.passing`. What autograd keeps of gathered weights for the backward pass (a linear layer a view of
        its own) it finds where they are gathered then, and holds none of them in between."""
        self._used.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._put_off, _found_again):
            yield

    def _put_off(self, kept: Tensor) -> Any:
        storage = kept.untyped_storage().data_ptr()
        for parameter in self._used.get(storage, ()):
            begins = kept.storage_offset() - parameter.storage_offset()
            here = parameter.ds_status.name == "AVAILABLE" and parameter.untyped_storage().data_ptr() == storage
            if here and 0 <= begins < parameter.ds_numel:
                return parameter, kept.size(), kept.stride(), begins
        return kept.detach()  # what is an output itself would hold the graph that holds it

    def spread(self) -> None:
        """See `DealtOut.spread`."""
        self.rest()

    def rest(self) -> None:
        """Let go of all that is gathered."""
        parameters: Any = self.model.parameters()
        for parameter in parameters:
            if parameter.ds_status.name == "AVAILABLE":
                parameter.ds_active_sub_modules.clear()
                parameter.partition()

    def here(self, parameter: nn.Parameter) -> Tensor:
        """See `DealtOut.here`."""
        held: Any = parameter
        return held.ds_tensor.data.narrow(0, 0, _share(held.ds_numel, held.ds_tensor.numel(), self.mesh.get_local_rank()))

    def state(self) -> dict[str, Tensor]:
        """See `DealtOut.state`."""
        self.rest()
        found: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            with _gathered(value):
                found[name] = value.detach().cpu().clone()
        return found


def _found_again(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    parameter, size, stride, begins = kept
    return parameter.detach().as_strided(size, stride, parameter.storage_offset() + begins)


def _share(numel: int, size: int, rank: int) -> int:
    """How many values of a flat tensor a rank holds, where each of the first ones holds `size`."""
    return max(0, min(size, numel - rank * size))


def _part(flat: Tensor, numel: int, mesh: DeviceMesh, offset: int | None) -> nn.Parameter:
    """This rank's range of a tensor of `numel` values: a view of `flat`, where it begins at `offset` (None: at its own place
    in the whole)."""
    size, rank = -(-numel // mesh.size()), mesh.get_local_rank()
    begins = min(size * rank, numel) if offset is None else offset
    local = flat.narrow(0, begins, _share(numel, size, rank))
    part = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))
    return nn.Parameter(part)


@contextmanager
def _gathered(value: Any) -> Iterator[None]:
    """Meanwhile a parameter of ZeRO-3 is whole; all ranks take part."""
    if not hasattr(value, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        yield


def _deal_by_deepspeed(model: nn.Module, device: str, offload: bool) -> None:
    """Deal out a model, whose modules gather their weights by hooks from now on."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    former = logging.root.manager.disable
    logging.disable(logging.INFO)  # it tells of each step of its own
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as compiled

        if device == "cpu":
            compiled["deepspeed_shm_comm"] = False  # a faster gloo, which it would compile now
        zero = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,  # else what a billion values do not come between is kept from pass to pass
            "stage3_prefetch_bucket_size": 0 if device == "cpu" else 50_000_000,  # where nothing overlaps
            "memory_efficient_linear": False,  # a layer of its own, which engines would not know
            **({"offload_param": {"device": "cpu", "pin_memory": device != "cpu"}} if offload else {}),
        }
        config = {"train_batch_size": dist.get_world_size(), "zero_optimization": zero}
        deepspeed.initialize(model=model, config=config, dist_init_required=False)
    finally:
        logging.disable(former)
