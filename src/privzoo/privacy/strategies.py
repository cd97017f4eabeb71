"""How a model is dealt out to ranks: `trainer.strategy`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from privzoo.errors import UserError
from privzoo.privacy.sharding import DealtOut, Fsdp
from privzoo.privacy.zero import Zero2, Zero3


@dataclass(frozen=True)
class Dealer:
    """Deals a model out to all ranks, which have joined one another.

    Args:
        strategy: "fsdp", "zero1", "zero2" or "zero3".
        device: where this rank computes.
        ranks: their number.
        offload: except with "fsdp", whether what is dealt out lies in the CPU's memory.
    """

    strategy: str
    device: torch.device
    ranks: int
    offload: bool = False

    def deals_out_trained(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> bool:
        """Whether trained parameters (or what is made of them) are dealt out, too; else frozen ones alone are."""
        values = sum(p.numel() for p in trained.values())
        return self.strategy != "fsdp" or 2 * values > sum(p.numel() for p in model.parameters())

    @property
    def keeps_weights_whole(self) -> bool:
        """Whether every rank holds all weights, on its device."""
        return self.strategy in ("zero1", "zero2")

    def __call__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> DealtOut:
        """Give each rank its part.

        Args:
            model: whole on every rank; in place.
            trained: parameters that any phase trains, by name.
        Raises:
            UserError: if trained weights would be dealt out beside quantised ones.
        """
        whole = not self.deals_out_trained(model, trained)
        if not whole and self.strategy == "fsdp" and not all(p.is_floating_point() for p in model.parameters()):
            raise UserError(
                "trainer.strategy=fsdp cannot deal out what is trained beside quantised weights: take "
                "trainer.strategy=zero3 or replicas, or a method that trains less, such as dp_qlora."
            )
        for module in model.modules():
            scales = getattr(module, "quant_state", None)  # of 4-bit weights; they stay whole, and nothing else moves them
            if scales is not None:
                scales.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        home = init_device_mesh("cpu", (self.ranks,)) if self.offload else mesh
        if self.keeps_weights_whole:
            return Zero2(model.to(self.device), trained, mesh, home, whole_sums=self.strategy == "zero1")
        if self.strategy == "zero3":
            return Zero3(model, trained, mesh, home)
        return Fsdp(model, trained, whole, mesh)
