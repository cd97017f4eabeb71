"""Per-sample gradients by Opacus' module hooks: a second oracle, and a peer in the benchmark.

Source: Yousefpour et al. 2021 (Opacus).
"""

import traceback
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from privzoo.privacy.clipping.engine import (
    ClippedSums,
    Forward,
    checked_units,
    sum_dtype,
    trainable_parameters,
)
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.layouts import UnsupportedUse


class OpacusHooks:
    """Clipped sums of per-sample gradients that Opacus makes, all of them at once: much memory.

    Guarantee: each module's hook is Opacus' own; a module that Opacus does not know, or a parameter that got no per-sample
    gradient, is refused. The pre-flight check compares with `Loop` on the user's own model.

    Args:
        model: gets Opacus' hooks, once; trainable parameters must sit in modules that Opacus knows.
        clipping: factors of norms, see `functions`.
    """

    def __init__(self, model: nn.Module, clipping: ClippingFunction = FLAT) -> None:
        self.model = model
        self.clipping = clipping
        self.hooks: GradSampleModule | None = None
        self.proved: set[str] = set()

    def __call__(
        self,
        forward: Forward,
        clip_norm: float,
        unit_of_row: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> ClippedSums:
        """Run `forward` and one backward pass; arguments and result as for `Loop`.

        Raises:
            UnsupportedUse: naming what Opacus cannot treat.
        """
        parameters = trainable_parameters(self.model)
        self._put_on()
        try:
            losses = self._forward(forward)
            units, count = checked_units(losses, unit_of_row)
            with torch.autocast(losses.device.type, enabled=False):
                self._backward(losses)
                found = {name: self._per_unit(name, p, units, count, len(losses)) for name, p in parameters.items()}
        finally:
            self._take_off(parameters)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):  # the caller's would round sums to bf16
            squares = [g.reshape(count, -1).square().sum(1) for g in found.values()]
            norms = torch.stack(squares).sum(0).sqrt()
            factors = self.clipping(norms, clip_norm)
            sums = {} if into is None else into
            for name, parameter in parameters.items():
                total = _weighted(found.pop(name), factors).to(sum_dtype(parameter))
                sums[name] = sums[name].add_(total) if name in sums else total
        return ClippedSums(sums, norms, losses.detach())

    def _put_on(self) -> None:
        if self.hooks is not None:
            self.hooks.enable_hooks()
            return
        try:
            self.hooks = GradSampleModule(self.model, batch_first=True, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise UnsupportedUse(f"Opacus: {str(error).splitlines()[0]}") from None

    @staticmethod
    def _forward(forward: Forward) -> Tensor:
        try:
            with torch.enable_grad():
                return forward()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, RuntimeError) as error:
            in_hook = any("opacus" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
            if in_hook or "BackwardHookFunction" in str(error):
                raise UnsupportedUse(f"Opacus fails on this model: {str(error).split('. ')[0]}") from error
            raise

    @staticmethod
    def _backward(losses: Tensor) -> None:
        try:
            losses.sum().backward()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            raise UnsupportedUse(f"Opacus fails on this model: {error}") from error

    def _per_unit(self, name: str, parameter: nn.Parameter, units: Tensor, count: int, rows: int) -> Tensor:
        gradient: Any = getattr(parameter, "grad_sample", None)
        if gradient is None and parameter.grad is not None:
            raise UnsupportedUse(f"{name}: Opacus gave no per-sample gradient, though it is used.")
        if gradient is None:
            return torch.zeros(count, *parameter.shape, dtype=sum_dtype(parameter), device=parameter.device)
        gradient = torch.stack(gradient).sum(0) if isinstance(gradient, list) else gradient  # one of each use
        if gradient.shape[0] != rows:
            raise UnsupportedUse(f"{name}: Opacus gave {gradient.shape[0]} per-sample gradients for {rows} rows.")
        wide = gradient.to(sum_dtype(parameter))
        if name not in self.proved:
            self._compare(name, wide.sum(0), parameter.grad)
        return wide.new_zeros(count, *parameter.shape).index_add_(0, units, wide)

    def _compare(self, name: str, total: Tensor, gradient: Tensor | None) -> None:
        """The first time, per-sample gradients must add up to autograd's own gradient: some hooks see a part only."""
        if gradient is None or not bool(torch.isfinite(total).all()):
            return
        if float((total - gradient).abs().max()) > 1e-3 * float(gradient.abs().max()) + 1e-6:
            raise UnsupportedUse(f"{name}: Opacus' per-sample gradients do not add up to the gradient.")
        self.proved.add(name)

    def _take_off(self, parameters: dict[str, nn.Parameter]) -> None:
        assert self.hooks is not None
        self.hooks.disable_hooks()
        for parameter in parameters.values():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]


def _weighted(gradients: Tensor, factors: Tensor) -> Tensor:
    """Sum over units, (*shape); a unit with factor 0 is masked: 0 * NaN is NaN."""
    dropped = (factors == 0).view(-1, *(1 for _ in gradients.shape[1:]))
    return torch.einsum("u,u...->...", factors.to(gradients.dtype), gradients.masked_fill(dropped, 0))
