"""What every engine returns, and the clip factor."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from privzoo.errors import UserError

Forward = Callable[[], Tensor]


class Dealt(Protocol):
    """What an engine asks of trained parameters of which each of several processes holds a part.

    Attributes:
        wholes: what modules use in a pass, by name of the parameter; the same objects in every pass.
        shapes: of them, in a pass.
    """

    wholes: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]

    def passing(self) -> AbstractContextManager[None]:
        """Around a forward pass."""

    def add(self, sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Add up a clipped sum over all processes; each keeps its part in `sums`."""


@dataclass(frozen=True)
class ClippedSums:
    """The answer to one query on private data. Adding or removing one unit moves `sums` by at most clip_norm (joint L2).

    Attributes:
        sums: clipped sum over units for every trainable parameter, by name.
        norms: gradient norm of each unit before clipping, shape (U,). Private: neither logged nor released.
        losses: detached loss of each row, shape (R,). Private.
    """

    sums: dict[str, Tensor]
    norms: Tensor
    losses: Tensor


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    r"""Scales that bring each unit's contribution within the clip norm.

    f_i = min(1, C / ||g_i||), so that ||f_i g_i|| <= C up to one rounding error of the input dtype. A zero gradient keeps
    f_i = 1. A non-finite norm gives f_i = 0; the caller must also mask that unit's rows, since 0 * NaN is NaN.

    Args:
        norms: per-unit gradient norms, shape (U,), same unit as clip_norm.
        clip_norm: C > 0; inf turns clipping off.
    Raises:
        ValueError: if clip_norm is not positive.
    Source: Abadi et al. 2016, Algorithm 1.

    >>> clip_factors(torch.tensor([0.5, 2.0, float("nan")]), clip_norm=1.0)
    tensor([1.0000, 0.5000, 0.0000])
    """
    if not clip_norm > 0:
        raise ValueError(f"Expected clip_norm={clip_norm} > 0.")
    if math.isinf(clip_norm):
        factors = torch.ones_like(norms)
    else:
        factors = (clip_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; a tied parameter once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def zero_sums(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Empty accumulators for a release: float32 at least, whatever the model's dtype."""
    return {name: torch.zeros_like(p, dtype=sum_dtype(p)) for name, p in parameters.items()}


def sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def checked_units(losses: Tensor, unit_of_row: Tensor | None) -> tuple[Tensor, int]:
    """Unit index of each row, shape (R,), and the number of units.

    Raises:
        UserError: if the losses are not one number a row, or `unit_of_row` does not match them.
    """
    if losses.dim() != 1:
        raise UserError(f"Expected one loss a row, shape (R,), found shape {tuple(losses.shape)}: was a mean taken?")
    if unit_of_row is None:
        return torch.arange(len(losses), device=losses.device), len(losses)
    if unit_of_row.shape != losses.shape:
        raise UserError(f"Expected unit_of_row of shape {tuple(losses.shape)}, found {tuple(unit_of_row.shape)}.")
    return unit_of_row, int(unit_of_row.max()) + 1


@contextmanager
def gradients_put_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Meanwhile every `.grad` starts from None; afterwards it is what it was."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
