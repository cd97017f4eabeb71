"""Two passes: one for the norms, then an ordinary backward pass of the weighted losses.

Slower than book-keeping, but activations and output gradients are forgotten layer by layer, and gradients are made by the
framework itself, as sharded training wants it.

Source: Lee and Kifer 2021; Li et al. 2022 (ghost clipping).
"""

import torch
from torch import Tensor, nn

from privzoo.privacy.clipping.book_keeping import BookKeeping, gradients
from privzoo.privacy.clipping.engine import (
    ClippedSums,
    Forward,
    checked_units,
    gradients_put_aside,
    sum_dtype,
    trainable_parameters,
)
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.layouts import Layouts, UnsupportedUse


class GhostTwoPass:
    """Clipped sums in two forward and two backward passes.

    Guarantee: as `BookKeeping`; the second pass rounds on its own, which norms allow for where activations meet gradients.
    Both passes see the same dropout masks. A micro-batch with a non-finite example is done again
    by `BookKeeping`, which can leave it out; a weighted loss cannot.

    Args:
        model: as for `BookKeeping`.
        clipping: factors of norms, see `functions`.
    """

    def __init__(self, model: nn.Module, clipping: ClippingFunction = FLAT) -> None:
        self.model = model
        self.clipping = clipping
        self.layouts = Layouts()

    def __call__(
        self,
        forward: Forward,
        clip_norm: float,
        unit_of_row: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> ClippedSums:
        """Run `forward` twice; arguments and result as for `Loop`.

        Raises:
            UnsupportedUse: if a trainable parameter is used in a way that is not known, or anything is of less than float32.
        """
        self._refuse_coarse()
        parameters = trainable_parameters(self.model)
        sums = {} if into is None else into
        device = next(iter(parameters.values())).device
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        losses, book = gradients(parameters, self.layouts, forward, unit_of_row, norms_only=True)
        assert isinstance(book, Book)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            norms = book.squared_norms().sqrt()
        del book
        factors = self.clipping(norms, clip_norm)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_rng_state(before[0])
            if before[1] is not None:
                torch.cuda.set_rng_state(before[1], device)
            if not bool(torch.isfinite(norms).all()):
                engine = BookKeeping(self.model, clipping=self.clipping)
                engine.layouts = self.layouts
                return engine(forward, clip_norm, unit_of_row, into)
            self._add_weighted(parameters, sums, forward, factors, unit_of_row)
        return ClippedSums(sums, norms, losses)

    def _refuse_coarse(self) -> None:
        """A frozen 4-bit or half-precision layer rounds the weighted gradient that passes through it on its way back."""
        coarse = next((n for n, p in self.model.named_parameters() if p.element_size() < 4), None)
        if coarse is not None:
            raise UnsupportedUse(
                f"{coarse} has less than 32 bits: the second pass would round on its own, beyond the clip norm; take "
                "BookKeeping, or model.dtype=float32 without quantisation."
            )

    @staticmethod
    def _add_weighted(
        parameters: dict[str, nn.Parameter],
        sums: dict[str, Tensor],
        forward: Forward,
        factors: Tensor,
        unit_of_row: Tensor | None,
    ) -> None:
        with gradients_put_aside(parameters.values()):
            with torch.enable_grad():
                losses = forward()
            units, _ = checked_units(losses, unit_of_row)
            if losses.requires_grad:
                (losses * factors[units].to(losses.dtype)).sum().backward()
            for name, parameter in parameters.items():
                dtype = sum_dtype(parameter)
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sums[name] = sums[name].add_(found) if name in sums else found.to(dtype)
