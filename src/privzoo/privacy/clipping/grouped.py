"""Group-wise clipping: each group of parameters has a clip norm of its own, so that it is clipped as soon as it has arrived.

With weights w_l and C_l = C w_l / sqrt(sum of w^2) for group l, sum of C_l^2 = C^2: one unit moves the joint sum by at most
C, as with flat clipping, and sigma is the same; but no group's factors need the norms of the others: nothing is kept until
the backward pass is over. Clipping group by group takes more from a gradient than clipping it as one, so accuracy differs.

Source: McMahan et al. 2018 (per-layer clipping); He et al. 2023 (group-wise clipping).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.privacy.clipping.functions import FLAT, ClippingFunction
from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.layouts import UnsupportedUse

GROUPS = ("all", "layer")


@dataclass(frozen=True)
class Grouping:
    """Which group each trainable parameter is clipped with, and that group's part of the clip norm.

    Args:
        of: group by parameter.
        clip_norm: C_l of a group of weight 1, C / sqrt(sum of squared weights).
        clipping: factors of a group's norms.
        weights: by group; 1 where it is not named.
    """

    of: dict[str, str]
    clip_norm: float
    clipping: ClippingFunction = FLAT
    weights: Mapping[str, float] = field(default_factory=dict)

    def factors(self, group: str, norms: Tensor) -> Tensor:
        """Clip factors (U,) of the norms (U,) of one group's part of each unit's gradient."""
        return self.clipping(norms, self.clip_norm * self.weights.get(group, 1.0))


def grouping(
    parameters: Iterable[str],
    groups: str,
    clip_norm: float,
    clipping: ClippingFunction = FLAT,
    shares: Mapping[str, float] | None = None,
) -> Grouping:
    """All parameters in one group, or those of each module ("layer") in one.

    The number of groups hangs on the model alone, never on what a batch makes use of.

    Args:
        shares: regular expression to weight, for the groups that it is found in (the first one that is); others have 1.
    Raises:
        UserError: if an expression is found in no group.

    >>> round(grouping(["a.weight", "a.bias", "b.weight"], "layer", clip_norm=1.0).clip_norm, 6)
    0.707107
    """
    of = {name: name.rpartition(".")[0] if groups == "layer" else "" for name in parameters}
    weights: dict[str, float] = {}
    for pattern, weight in (shares or {}).items():
        found = [group for group in of.values() if re.search(pattern, group)]
        if not found:
            raise UserError(
                f"method.engine.shares names {pattern!r}, which no group of trained parameters is called: expected a part "
                f"of a name such as {next(iter(of.values()), '')!r}."
            )
        weights = dict.fromkeys(found, float(weight)) | weights
    squares = sum(weights.get(group, 1.0) ** 2 for group in set(of.values()))
    return Grouping(of, clip_norm / math.sqrt(squares or 1), clipping, weights)


def checked_groups(groups: str, shares: Mapping[str, float] | None = None) -> str:
    """Raises UserError unless it is one of `GROUPS`, and shares are numbers above 0 for groups by layer."""
    if groups not in GROUPS:
        raise UserError(f"Unknown groups={groups!r}: expected method.engine.groups=all or layer.")
    if shares and groups != "layer":
        raise UserError("method.engine.shares needs groups to share among: set method.engine.groups=layer.")
    for pattern, weight in (shares or {}).items():
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise UserError(f"Expected method.engine.shares[{pattern}]={weight} to be a number above 0.")
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
        book.add_clipped(self.sums, self.grouping.factors(group, squares.sqrt()))
        self.squares = self.squares + squares
        self.finished.add(group)
