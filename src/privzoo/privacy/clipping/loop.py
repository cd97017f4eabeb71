"""The definition: one backward pass per unit. Slow, plain, and the oracle of every other engine."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from privzoo.errors import UserError
from privzoo.privacy.clipping.engine import (
    ClippedSums,
    Forward,
    checked_units,
    gradients_put_aside,
    sum_dtype,
    trainable_parameters,
    zero_sums,
)
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.grouped import checked_groups, grouping


class Loop:
    """Clipped sum by definition: for each unit the gradient of the sum of its rows' losses, clipped, added up.

    Args:
        model: only its trainable parameters are looked at.
        groups: "all", or "layer": each module's part of a gradient is clipped on its own (see `grouped`).
        clipping: factors of norms, see `functions`.
        shares: weights of groups by layer, see `grouping`; None: all alike.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: str = "all",
        clipping: ClippingFunction = FLAT,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.groups, self.shares = checked_groups(groups, shares), shares
        self.clipping = clipping

    def __call__(
        self,
        forward: Forward,
        clip_norm: float,
        unit_of_row: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> ClippedSums:
        """Run `forward` once and a backward pass per unit.

        Args:
            forward: gives losses, shape (R,).
            clip_norm: C; inf turns clipping off.
            unit_of_row: unit index of each row, shape (R,); None if every row is a unit.
            into: accumulators that the sums are added to in place; fresh zeros by default.
        Raises:
            UserError: if several gradients are not finite. One poisoned row can make all others of its micro-batch NaN
                (0 * NaN in a weight's gradient), which would take away their contributions too.
        """
        parameters = trainable_parameters(self.model)
        sums = zero_sums(parameters) if into is None else into
        for name, zeros in zero_sums({n: p for n, p in parameters.items() if n not in sums}).items():
            sums[name] = zeros
        with torch.enable_grad():
            losses = forward()
        units, count = checked_units(losses, unit_of_row)
        norms = losses.new_zeros(count, dtype=torch.promote_types(losses.dtype, torch.float32))
        groups = grouping(parameters, self.groups, clip_norm, self.clipping, self.shares)
        for unit in range(count):
            gradients = self._gradients(parameters, losses[units == unit].sum())
            norms[unit] = _norm(gradients.values())
            for group in set(groups.of.values()):
                part = {name: gradient for name, gradient in gradients.items() if groups.of[name] == group}
                factor = groups.factors(group, _norm(part.values()).to(norms.dtype).view(1))
                if factor.item() > 0:
                    for name, gradient in part.items():
                        sums[name].add_(gradient * factor[0])
        if int((~torch.isfinite(norms)).sum()) > 1:
            raise UserError("Loop cannot tell a non-finite example from its neighbours: take microbatch_size=1.")
        return ClippedSums(sums, norms, losses.detach())

    @staticmethod
    def _gradients(parameters: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
        with gradients_put_aside(parameters.values()):
            if loss.requires_grad:
                loss.backward(retain_graph=True)  # not autograd.grad, which reentrant checkpointing refuses
            found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return {name: gradient.to(sum_dtype(gradient)) for name, gradient in found.items()}


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.sqrt(sum((g.double().square().sum() for g in gradients), torch.zeros(())))
