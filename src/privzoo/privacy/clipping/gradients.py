"""The book: what each use of a parameter leaves behind, and the norms and clipped sums made of it.

Shapes: R rows, U units, T positions of a row (after `by_unit`: of a unit), a × b the parameter seen as a matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from privzoo.errors import UserError


@dataclass(frozen=True)
class Outer:
    """A per-unit gradient kept as factors: sum over t of left[t] ⊗ right[t].

    `left` is dense, (U, T, a), or holds row indices of a table, (U, T) of integers (an embedding: one-hot rows).
    `right` is (U, T, b).
    """

    left: Tensor
    right: Tensor

    @property
    def is_table(self) -> bool:
        return not self.left.is_floating_point()


class Book:
    """Collects the uses of one backward pass.

    Args:
        dtypes: dtype to reckon in, by parameter name (float32 at least).
    """

    def __init__(self, dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes
        self.outer: dict[str, list[Outer]] = {}
        self.instantiated: dict[str, Tensor] = {}
        self.rows = self.count = 0
        self.units: Tensor | None = None
        self.slots: Tensor | None = None

    def open(self, rows: int, units: Tensor | None, count: int) -> None:
        """State how many rows there are and, where several rows make a unit, which unit each belongs to."""
        self.rows, self.count, self.units = rows, count, units
        if units is not None:
            earlier = (units.unsqueeze(0) == units.unsqueeze(1)).tril(-1)
            self.slots = earlier.sum(1)  # how many rows of the same unit stand before this one

    def checked(self, value: Tensor) -> Tensor:
        """The value with the examples first, in float32 at least; (R * T, p), as OPT makes it, becomes (R, T, p)."""
        if value.dim() == 2 and value.shape[0] != self.rows:
            value = self.split_rows(value)
        if value.shape[0] != self.rows:
            raise UserError(f"Expected first axis {self.rows} (the examples), found shape {tuple(value.shape)}.")
        return value if value.dtype == torch.float64 else value.float()

    def split_rows(self, value: Tensor) -> Tensor:
        """(R * T, p) to (R, T, p)."""
        if value.shape[0] % self.rows:
            raise UserError(f"Expected a multiple of {self.rows} rows, found shape {tuple(value.shape)}.")
        return value.reshape(self.rows, -1, value.shape[-1])

    def by_unit(self, value: Tensor) -> Tensor:
        """(R, …, p) to (U, T, p): rows of one unit follow one another along T."""
        value = self.checked(value)
        value = value.reshape(self.rows, -1, value.shape[-1])
        return self._merged(value)

    def _merged(self, value: Tensor) -> Tensor:
        if self.units is None or self.slots is None:
            return value
        most = int(self.slots.max()) + 1
        merged = value.new_zeros(self.count, most, *value.shape[1:])
        merged[self.units, self.slots] = value
        return merged.flatten(1, 2)

    def add_outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """A use whose gradient is left^T right, both (R, …, ·)."""
        self.outer.setdefault(name, []).append(Outer(self.by_unit(left), self.by_unit(right)))

    def add_rows_of_table(self, name: str, ids: Tensor, gradient: Tensor) -> None:
        """A table look-up: `ids` (R, …) of integers, `gradient` (R, …, b)."""
        ids = self._merged(ids.reshape(self.rows, -1, 1)).squeeze(-1)  # filled up with row 0, where the gradient is 0
        self.outer.setdefault(name, []).append(Outer(ids, self.by_unit(gradient)))

    def summed(self, value: Tensor) -> Tensor:
        """(R, …, p) to (R, p): the gradient of a bias."""
        return self.checked(value).reshape(self.rows, -1, value.shape[-1]).sum(1)

    def add_instantiated(self, name: str, gradient: Tensor) -> None:
        """A use whose per-row gradient (R, *shape) is at hand."""
        if self.units is not None:
            gradient = gradient.new_zeros(self.count, *gradient.shape[1:]).index_add_(0, self.units, gradient)
        self._add_per_unit(name, gradient)

    def _add_per_unit(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.to(self.dtypes[name])
        known = self.instantiated.get(name)
        self.instantiated[name] = gradient if known is None else known + gradient

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each unit's whole gradient, shape (U,)."""
        for name in self.outer.keys() & self.instantiated.keys():
            for use in self.outer.pop(name):
                self._add_per_unit(name, _instantiate(use, self.instantiated[name].shape))
        pieces = [g.reshape(self.count, -1).square().sum(1) for g in self.instantiated.values()]
        for uses in self.outer.values():
            pieces += [_inner_product(u, v) * (1 if u is v else 2) for i, u in enumerate(uses) for v in uses[: i + 1]]
            pieces.append(_rounding(uses))
        return torch.stack(pieces).sum(0).clamp(min=0) if pieces else torch.zeros(self.count)

    def add_clipped(self, sums: dict[str, Tensor], factors: Tensor) -> None:
        """Add factor-weighted gradients to `sums`, in place. A unit with factor 0 is masked: 0 * NaN is NaN."""
        masked = factors == 0
        for name, gradient in self.instantiated.items():
            gradient = _without(gradient, masked)
            sums[name].add_(torch.einsum("u,u...->...", factors.to(gradient.dtype), gradient).reshape(sums[name].shape))
        for name, uses in self.outer.items():
            for use in uses:
                _add_outer(sums[name], use, factors, masked)


def _without(value: Tensor, masked: Tensor) -> Tensor:
    if not bool(masked.any()):
        return value
    return torch.where(masked.view(-1, *(1 for _ in value.shape[1:])), torch.zeros_like(value), value)


def _add_outer(total: Tensor, use: Outer, factors: Tensor, masked: Tensor) -> None:
    right = _without(use.right, masked)
    weighted = right * factors.to(right.dtype).view(-1, 1, 1)
    matrix = total.view(-1, right.shape[-1]) if use.is_table else total.view(use.left.shape[-1], -1)
    if use.is_table:
        matrix.index_add_(0, use.left.flatten(), weighted.flatten(0, 1).to(total.dtype))
    else:
        left = _without(use.left, masked)
        matrix.addmm_(left.flatten(0, 1).T.to(total.dtype), weighted.flatten(0, 1).to(total.dtype))


def _instantiate(use: Outer, shape: torch.Size) -> Tensor:
    """(U, *shape) gradient of one use."""
    if not use.is_table:
        return torch.bmm(use.left.transpose(1, 2), use.right).reshape(shape)
    dense = use.right.new_zeros(shape)
    dense.scatter_add_(1, use.left.unsqueeze(-1).expand_as(use.right), use.right)
    return dense


def _rounding(uses: list[Outer]) -> Tensor:
    """Bound on the rounding of a parameter's squared norm, (U,), to be added to it, so that no contribution exceeds C.

    Positions may cancel: the terms are then far larger than the norm, and so is their rounding. It stays within
    2 eps (sum of |left[t]| |right[t]|)^2 in trials; twice that also covers the rounding of the clipped sum.
    """
    lengths = [u.right.norm(dim=2) if u.is_table else u.left.norm(dim=2) * u.right.norm(dim=2) for u in uses]
    terms = torch.stack([length.sum(1) for length in lengths]).sum(0)
    return 4 * torch.finfo(terms.dtype).eps * terms.square()


def _inner_product(u: Outer, v: Outer) -> Tensor:
    """<gradient of u, gradient of v> per unit, (U,): through T × T Gram matrices or, where cheaper, the gradient itself.

    Gram matrices are in float64: where positions cancel, their float32 products can round to 0 for a large gradient.
    """
    if u is v and not u.is_table:
        positions, a, b = u.left.shape[1], u.left.shape[2], u.right.shape[2]
        if a * b <= positions * (a + b):
            return torch.bmm(u.left.transpose(1, 2), u.right).flatten(1).square().sum(1)
    right = torch.bmm(u.right.double(), v.right.double().transpose(1, 2))
    return (_left_gram(u, v) * right).flatten(1).sum(1).to(u.right.dtype)


def _left_gram(u: Outer, v: Outer) -> Tensor:
    """left_u · left_v for every pair of positions, (U, T_u, T_v); a table's left factor is a one-hot row."""
    if u.is_table and v.is_table:
        return (u.left.unsqueeze(2) == v.left.unsqueeze(1)).double()
    if u.is_table:
        return _left_gram(v, u).transpose(1, 2)
    if v.is_table:
        return u.left.double().gather(2, v.left.unsqueeze(1).expand(-1, u.left.shape[1], -1))
    return torch.bmm(u.left.double(), v.left.double().transpose(1, 2))
