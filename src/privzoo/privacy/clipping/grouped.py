"""Group-wise clipping: each group of parameters has a clip norm of its own, so that it is clipped as soon as it has arrived.

With G groups and C / sqrt(G) for each, one unit moves the joint sum by at most C, as with flat clipping, and sigma is the
same; but no group's factors need the norms of the others: nothing is kept until the backward pass is over. Clipping group by
group takes more from a gradient than clipping it as one, so accuracy is another.

Source: McMahan et al. 2018 (per-layer clipping); He et al. 2023 (group-wise clipping).
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.layouts import UnsupportedUse

GROUPS = ("all", "layer")


@dataclass(frozen=True)
class Grouping:
    """Which group each trainable parameter is clipped with, and that group's share of the clip norm.

    Args:
        of: group by parameter.
        clip_norm: C / sqrt(number of groups).
        clipping: factors of a group's norms.
    """

    of: dict[str, str]
    clip_norm: float
    clipping: ClippingFunction = FLAT


def grouping(parameters: Iterable[str], groups: str, clip_norm: float, clipping: ClippingFunction = FLAT) -> Grouping:
    """All parameters in one group, or those of each module ("layer") in one.

    The number of groups hangs on the model alone, never on what a batch makes use of.

    >>> round(grouping(["a.weight", "a.bias", "b.weight"], "layer", clip_norm=1.0).clip_norm, 6)
    0.707107
    """
    of = {name: name.rpartition(".")[0] if groups == "layer" else "" for name in parameters}
    return Grouping(of, clip_norm / math.sqrt(max(1, len(set(of.values())))), clipping)


def checked_groups(groups: str) -> str:
    """Raises UserError unless it is one of `GROUPS`."""
    if groups not in GROUPS:
        raise UserError(f"Unknown groups={groups!r}: expected method.engine.groups=all or layer.")
    return groups


class GroupedBook:
    """Takes what a `Book` takes, and adds each group to the sums, clipped, when its last parameter has arrived.

    Args:
        fresh_book: makes the book of one group.
        grouping: of the parameters.
        sums: what clipped gradients are added to, in place.
        used: parameters that something is expected of.
        once: those of them whose whole gradient arrives at once. A group with others waits for `finish`.
    """

    def __init__(
        self,
        fresh_book: Callable[[], Book],
        grouping: Grouping,
        sums: dict[str, Tensor],
        used: Collection[str],
        once: Collection[str],
    ) -> None:
        self.fresh_book, self.grouping, self.sums = fresh_book, grouping, sums
        self.books: dict[str, Book] = {}
        self.finished: set[str] = set()
        empty = fresh_book()
        self.rows, self.norms_only = empty.rows, empty.norms_only
        self.squares = torch.zeros(empty.count, device=empty.device)
        self.missing: dict[str, set[str]] = {}
        for name in used:
            self.missing.setdefault(self._group(name), set()).add(name)
        self.early = {group for group, names in self.missing.items() if names <= set(once)}

    def add_pair(self, name: str, activation: Tensor, gradient: Tensor, transposed: bool = False) -> None:
        self._book(name).add_pair(name, activation, gradient, transposed)
        self._has_arrived(name)

    def add_rows(self, name: str, gradient: Tensor) -> None:
        self._book(name).add_rows(name, gradient)
        self._has_arrived(name)

    def add_units(self, name: str, gradient: Tensor) -> None:
        self._book(name).add_units(name, gradient)

    def allow_for(self, parts: Tensor, factor: float = 1.0) -> None:
        """Nothing: sums are made here, by what was measured."""

    def take(self, name: str) -> Tensor | None:
        return self._book(name).take(name)

    def finish(self) -> Tensor:
        """Clip and add what has not been yet; returns the norm of each unit's whole gradient before clipping, (U,)."""
        for group in list(self.books):
            self._clip(group)
        return self.squares.sqrt()

    def _group(self, name: str) -> str:
        return self.grouping.of.get(name, name)  # a derived parameter is on its own until it is pulled back

    def _book(self, name: str) -> Book:
        group = self._group(name)
        if group in self.finished:
            raise UnsupportedUse(f"{name} is used once more after its group was clipped: take method.engine.groups=all.")
        return self.books.setdefault(group, self.fresh_book())

    def _has_arrived(self, name: str) -> None:
        group = self._group(name)
        self.missing.get(group, set()).discard(name)
        if group in self.early and not self.missing[group]:
            self._clip(group)

    def _clip(self, group: str) -> None:
        book = self.books.pop(group)
        squares = book.squared_norms()
        book.add_clipped(self.sums, self.grouping.clipping(squares.sqrt(), self.grouping.clip_norm))
        self.squares = self.squares + squares
        self.finished.add(group)
