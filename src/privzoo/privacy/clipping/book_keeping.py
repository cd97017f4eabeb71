"""One backward pass: trainable parameters leave autograd, and every use of one keeps what its gradient is made of.

Sources: Goodfellow 2015 (per-example norms); Li et al. 2022 (ghost norm); Bu et al. 2022 (book-keeping).
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from privzoo.privacy.clipping.engine import (
    ClippedSums,
    Dealt,
    Forward,
    checked_units,
    gradients_put_aside,
    sum_dtype,
    trainable_parameters,
)
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.grouped import GroupedBook, Grouping, checked_groups, grouping
from privzoo.privacy.clipping.interception import Interception
from privzoo.privacy.clipping.layouts import Layouts, UnsupportedUse, proof_weights
from privzoo.privacy.clipping.operations import ELEMENTWISE, HANDLERS


class BookKeeping:
    """Clipped sums in one forward and one backward pass.

    Guarantee: equal to `Loop` up to rounding, or `UnsupportedUse`. Where the examples lie in a tensor is proved on the first
    batch of several rows, by a few more backward passes.

    Args:
        model: its trainable parameters may be used in the operations of `operations.HANDLERS`, elementwise with data, and in
            any expression of parameters alone; several times, tied, and under gradient checkpointing of both kinds.
        groups: "all" clips the gradient as one; "layer" each module's part on its own (see `grouped`), which keeps nothing
            until the backward pass is over.
        clipping: factors of norms, see `functions`.
        shares: weights of groups by layer, see `grouping`; None: all alike.

    Attributes:
        dealt: where each of several processes holds a part of the trained parameters, with groups="all": `sums` are then of
            all processes, and each gets its part of them; None: they are whole, and sums are this process's.
    """

    even_passes = True  # one forward and one backward pass a micro-batch, whatever is in it, once layouts are proved

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
        self.layouts = Layouts()
        self.dealt: Dealt | None = None

    def __call__(
        self,
        forward: Forward,
        clip_norm: float,
        unit_of_row: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> ClippedSums:
        """Run `forward` and one backward pass; arguments and result as for `Loop`.

        Raises:
            UnsupportedUse: if a trainable parameter is used in a way that is not known here.
        """
        parameters = trainable_parameters(self.model) if self.dealt is None else self.dealt.wholes
        sums = {} if into is None else into
        groups = None
        if self.groups != "all":
            groups = grouping(parameters, self.groups, clip_norm, self.clipping, self.shares)
        shapes = None if self.dealt is None else self.dealt.shapes
        run = forward if self.dealt is None else partial(_passing, self.dealt, forward)
        losses, book = gradients(parameters, self.layouts, run, unit_of_row, groups=groups, sums=sums, shapes=shapes)
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            if isinstance(book, GroupedBook):
                norms = book.finish()
            else:
                norms = book.squared_norms().sqrt()
                factors = self.clipping(norms, clip_norm)
                if self.dealt is None:
                    book.add_clipped(sums, factors)
                else:
                    for name, value in book.clipped(parameters, factors):
                        self.dealt.add(sums, name, value)
        for name, parameter in parameters.items():
            if name not in sums:
                sums[name] = torch.zeros_like(parameter, dtype=sum_dtype(parameter))
        return ClippedSums(sums, norms, losses)


def _passing(dealt: Dealt, forward: Forward) -> Tensor:
    with dealt.passing():
        return forward()


def gradients(
    parameters: dict[str, nn.Parameter],
    layouts: Layouts,
    forward: Forward,
    unit_of_row: Tensor | None,
    norms_only: bool = False,
    groups: Grouping | None = None,
    sums: dict[str, Tensor] | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
) -> tuple[Tensor, Book | GroupedBook]:
    """Run `forward` and a backward pass; returns the losses (R,), detached, and the book of all gradients.

    Args:
        norms_only: the book is for `squared_norms` alone, and forgets what it has measured.
        groups: each is clipped as it arrives, and added to `sums`.
        shapes: of parameters that have none between passes; None: they have their own.
    Raises:
        UnsupportedUse: if a trainable parameter is used in a way that is not known here.
    """
    seen = Interception(parameters, layouts, HANDLERS, ELEMENTWISE)
    with torch.enable_grad(), gradients_put_aside(parameters.values()):
        with seen:
            losses = forward()
        if seen.name(losses):
            raise UnsupportedUse(f"{seen.name(losses)}: the losses are made of data in an operation that is not known here.")
        units: Tensor | None
        units, count = checked_units(losses, unit_of_row)
        if seen.needs_rows and seen.rows != len(losses):
            raise UnsupportedUse(f"Expected {len(losses)} rows (one a loss) at the first operation, found {seen.rows}.")
        known = shapes or {}
        all_shapes = {n: (known.get(n, p.shape), sum_dtype(p)) for n, p in (*parameters.items(), *seen.derived.items())}
        units = units if unit_of_row is not None else None

        def part() -> Book:
            return Book(all_shapes, len(losses), units, count, losses.device, norms_only, seen.used_once())

        def fresh_book(for_good: bool) -> Book | GroupedBook:
            if groups is None or sums is None:
                return part()
            used = (seen.uses.keys() | seen.elsewhere) & parameters.keys()
            return GroupedBook(part, groups, sums, used, seen.used_once() if for_good else ())

        seen.book = fresh_book(for_good=False)
        with torch.autocast(losses.device.type, enabled=False):  # the caller's: norms would be too small by up to 2^-8
            if losses.requires_grad:
                _collect(seen, losses, fresh_book)
            unseen = [name for name, parameter in parameters.items() if parameter.grad is not None]
            if unseen:  # parameters are detached wherever they are seen
                raise UnsupportedUse(f"{unseen[0]} is used where BookKeeping sees nothing (TorchScript?): freeze it.")
            _pull_back(seen, seen.book, parameters)
    return losses.detach(), seen.book


def _collect(seen: Interception, losses: Tensor, fresh_book: Callable[[bool], Book | GroupedBook]) -> None:
    """The backward pass, after a proof of where the examples lie if that is not known yet; one row needs none."""
    proved, unreached, several = seen.layouts.proved, seen.layouts.unreached, len(losses) > 1
    proving = several and not seen.keys <= proved.keys() | unreached
    if proving:
        _prove(seen, losses)
    uncertain = several and not proving and (seen.hidden or not seen.keys <= proved.keys())
    seen.book = fresh_book(not uncertain)  # what is clipped at once cannot be taken back
    seen.run_backward(losses, torch.ones_like(losses), keep_graph=uncertain)
    if uncertain and not seen.arrivals <= proved.keys():
        _prove(seen, losses)
        seen.book = fresh_book(True)
        seen.run_backward(losses, torch.ones_like(losses), keep_graph=False)


def _prove(seen: Interception, losses: Tensor) -> None:
    """Backward passes that show where the examples lie."""
    if seen.layouts.closed:
        raise UnsupportedUse("A gradient arrives where the pre-flight saw none: take trainer.strategy=replicas.")
    weights = proof_weights(len(losses), losses.device)
    for seen.turn, each in enumerate([torch.ones_like(weights[0]), *weights]):
        seen.run_backward(losses, each, keep_graph=True)
    seen.turn = None
    seen.layouts.conclude(weights, seen.keys)


def _pull_back(seen: Interception, book: Book | GroupedBook, parameters: dict[str, nn.Parameter]) -> None:
    """Per-unit gradients of derived parameters, brought back to the parameters that they were made of."""
    for name, value in seen.derived.items():
        arrived = book.take(name)
        if arrived is None:
            continue
        found = torch.autograd.grad(
            value, list(parameters.values()), arrived.to(value.dtype), retain_graph=True, allow_unused=True,
            is_grads_batched=True,
        )  # fmt: skip
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                book.add_units(parameter, gradient)
