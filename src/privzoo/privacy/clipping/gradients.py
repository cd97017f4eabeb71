"""The book: what each use of a parameter leaves behind, and the norms and clipped sums made of it.

Shapes: R rows, U units, T positions of a row (after `by_unit`: of a unit), d width of the activation, p of the output.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from privzoo.privacy.clipping import gram

# A pair (T (d + p) numbers a unit) becomes the gradient itself (d p numbers) where that takes at most so many times the
# memory: it then costs no Gram matrices and no second product.
INSTANTIATE_UP_TO = 1.25
_LOST_BY_ROUNDING = 1e-3  # part of a squared norm; above it Gram matrices are reckoned again in float64


@dataclass(frozen=True)
class Pair:
    """A gradient kept as factors: sum over t of gradient[t] ⊗ activation[t].

    `activation` is dense, (U, T, d), or holds the looked-up rows of a table, (U, T) of integers (an embedding: one-hot).
    `gradient` is (U, T, p). `transposed`: the parameter is (d, p), as a table or a Conv1D; else (p, d).
    """

    activation: Tensor
    gradient: Tensor
    transposed: bool

    @property
    def is_table(self) -> bool:
        return not self.activation.is_floating_point()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the parameter as a matrix: its gradient is their outer product, summed over positions."""
        return (self.activation, self.gradient) if self.transposed else (self.gradient, self.activation)


class Book:
    """Collects the uses of one backward pass.

    Args:
        shapes: shape and dtype to reckon in (float32 at least), by parameter.
        rows: R.
        units: unit of each row, (R,); None if each row is one.
        count: U.
        device: of the gradients.
        norms_only: the sums are made elsewhere, and round there on their own.
        used_once: parameters whose gradients are, with norms_only, measured as they come and forgotten.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[torch.Size, torch.dtype]],
        rows: int,
        units: Tensor | None,
        count: int,
        device: torch.device,
        norms_only: bool = False,
        used_once: Collection[str] = (),
    ) -> None:
        self.shapes, self.rows, self.units, self.count, self.device = shapes, rows, units, count, device
        self.norms_only, self.used_once = norms_only, used_once
        self.measured: list[Tensor] = []
        self.terms = torch.zeros((), device=device)
        self.pairs: dict[str, list[Pair]] = {}
        self.instantiated: dict[str, Tensor] = {}
        self.slots: Tensor | None = None
        if units is not None:
            earlier = (units.unsqueeze(0) == units.unsqueeze(1)).tril(-1)
            self.slots = earlier.sum(1)  # how many rows of the same unit stand before this one

    # ---- what arrives, examples first

    def add_pair(self, name: str, activation: Tensor, gradient: Tensor, transposed: bool = False) -> None:
        """A use whose gradient sums outer products of `activation`, (R, …, d) or integers (R, …), `gradient` (R, …, p)."""
        if not activation.is_floating_point():
            activation = activation.unsqueeze(-1)
        activation, gradient = self._by_unit(activation), self._by_unit(gradient)
        if not activation.is_floating_point():
            activation = activation.squeeze(-1)  # filled up with row 0, where the gradient is 0
        pair = Pair(activation, gradient, transposed)
        if self.norms_only:
            self.terms = self.terms + _terms(pair).square()
        if self._is_small(name, pair):
            self._add_per_unit(name, self._instantiate(name, pair))
        else:
            self.pairs.setdefault(name, []).append(pair)
        self._forget_measured(name)

    def add_rows(self, name: str, gradient: Tensor) -> None:
        """A use whose per-row gradient (R, *shape) is at hand."""
        if self.units is not None:
            gradient = gradient.new_zeros(self.count, *gradient.shape[1:]).index_add_(0, self.units, gradient)
        self._add_per_unit(name, gradient)
        self._forget_measured(name)

    def allow_for(self, parts: Tensor, factor: float = 1.0) -> None:
        """With norms_only: a sum made elsewhere adds up these `parts`, (R, T, p), each up to `factor` times as long."""
        if self.norms_only:
            lengths = factor * _lengths(parts).sum(1)
            if self.units is not None:
                lengths = lengths.new_zeros(self.count).index_add_(0, self.units, lengths)
            self.terms = self.terms + lengths.square()

    def add_units(self, name: str, gradient: Tensor) -> None:
        """As `add_rows`, by unit: (U, *shape)."""
        self._add_per_unit(name, gradient)

    def take(self, name: str) -> Tensor | None:
        """The whole gradient of each unit, (U, *shape), out of the book; None if there is none."""
        for pair in self.pairs.pop(name, []):
            self._add_per_unit(name, self._instantiate(name, pair))
        return self.instantiated.pop(name, None)

    def _forget_measured(self, name: str) -> None:
        if self.norms_only and name in self.used_once:
            alone = Book(self.shapes, self.rows, self.units, self.count, self.device)
            if name in self.pairs:
                alone.pairs[name] = self.pairs.pop(name)
            if name in self.instantiated:
                alone.instantiated[name] = self.instantiated.pop(name)
            self.measured.append(alone.squared_norms())

    def _by_unit(self, value: Tensor) -> Tensor:
        """(R, …, p) to (U, T, p): rows of one unit follow one another along T."""
        value = value.reshape(self.rows, -1, value.shape[-1])
        if self.units is None or self.slots is None:
            return value
        most = int(self.slots.max()) + 1
        merged = value.new_zeros(self.count, most, *value.shape[1:])
        merged[self.units, self.slots] = value
        return merged.flatten(1, 2)

    def _add_per_unit(self, name: str, gradient: Tensor) -> None:
        shape, dtype = self.shapes[name]
        gradient = gradient.to(dtype).reshape(self.count, *shape)
        known = self.instantiated.get(name)
        self.instantiated[name] = gradient if known is None else known + gradient

    def _is_small(self, name: str, pair: Pair) -> bool:
        width = pair.gradient.shape[-1] + (0 if pair.is_table else pair.activation.shape[-1])
        return self.shapes[name][0].numel() <= INSTANTIATE_UP_TO * pair.gradient.shape[1] * width

    def _instantiate(self, name: str, pair: Pair) -> Tensor:
        """(U, *shape) gradient of one use."""
        shape, dtype = self.shapes[name]
        if pair.is_table:
            gradient = pair.gradient.to(dtype)
            dense = gradient.new_zeros(self.count, *shape)
            return dense.scatter_add_(1, pair.activation.unsqueeze(-1).expand_as(gradient), gradient)
        rows, columns = pair.factors()
        return torch.bmm(rows.to(dtype).transpose(1, 2), columns.to(dtype)).reshape(self.count, *shape)

    # ---- norms

    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each unit's whole gradient, shape (U,), never too small by rounding."""
        for name in self.pairs.keys() & self.instantiated.keys():
            self.instantiated[name] = self.take(name)  # type: ignore[assignment]
        exact = [_squares(gradient.reshape(self.count, -1)) for gradient in self.instantiated.values()]
        for name, pairs in self.pairs.items():
            exact += [gram.table_squared_norms(*p.factors(), self.shapes[name][0][0]) for p in pairs if p.is_table]
            exact += [
                2 * gram.inner_products(u.factors(), v.factors()) for i, u in enumerate(pairs) for v in pairs[:i]
            ]  # fmt: skip
        total = sum([*exact, *self.measured], torch.zeros(self.count, device=self.device))
        found, terms = self._of_grams(torch.float32)
        eps = torch.finfo(torch.promote_types(total.dtype, found.dtype)).eps
        # Positions may cancel: the terms are then far larger than the norm, and so is their rounding. It stays within
        # 2 eps terms in trials; twice that also covers the rounding of the clipped sum.
        bound = 4 * eps * terms
        if bool((bound > _LOST_BY_ROUNDING * (total + found)).any()):
            found, terms = self._of_grams(torch.float64)
            bound = _with_slack(total + found, 2 * eps * terms.sqrt())  # what is left: the rounding of the clipped sum
        return (total + found + bound + _with_slack(total + found, 2 * eps * self.terms.sqrt())).clamp(min=0)

    def _of_grams(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Squared norms (U,) of all dense pairs by Gram matrices, and of the terms that they are sums of."""
        groups: dict[tuple, list[Pair]] = {}
        terms = torch.zeros(self.count, device=self.device)
        for pairs in self.pairs.values():
            lengths = torch.zeros(self.count, device=terms.device)
            for pair in (p for p in pairs if not p.is_table):
                at = (pair.activation.data_ptr(), pair.activation.shape, pair.activation.stride())
                groups.setdefault(at, []).append(pair)
                lengths = lengths + _terms(pair)
            terms = terms + lengths.square()
        found = [
            gram.squared_norms(pairs[0].activation, [pair.gradient for pair in pairs], self._precise(pairs[0], dtype))
            for pairs in groups.values()
        ]
        return sum(found, torch.zeros_like(terms)), terms

    @staticmethod
    def _precise(pair: Pair, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(torch.promote_types(dtype, pair.activation.dtype), pair.gradient.dtype)

    # ---- sums

    def add_clipped(self, sums: dict[str, Tensor], factors: Tensor) -> None:
        """Add factor-weighted gradients to `sums` in place, and forget them; a parameter that is not in `sums` comes in.

        A unit with factor 0 is masked: 0 * NaN is NaN.
        """
        masked = _masked(factors)
        # At the peak, each sum stands beside what is still kept.
        for name in (*reversed(self.instantiated), *sorted(self.pairs, key=self._grows_by)):
            self._add_to(sums, name, factors, masked)

    def clipped(self, names: Iterable[str], factors: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As `add_clipped`, one parameter after another in the order of `names`, each alone; 0 where nothing arrived."""
        masked = _masked(factors)
        for name in names:
            alone: dict[str, Tensor] = {}
            self._add_to(alone, name, factors, masked)
            shape, dtype = self.shapes[name]
            yield name, alone.pop(name) if alone else torch.zeros(shape, dtype=dtype, device=self.device)

    def _add_to(self, sums: dict[str, Tensor], name: str, factors: Tensor, masked: Tensor | None) -> None:
        if name in self.instantiated:
            gradient = _without(self.instantiated.pop(name), masked)
            shape, dtype = self.shapes[name]
            matrix, weights = gradient.reshape(self.count, -1).t(), factors.to(dtype)
            if name in sums:
                sums[name].view(-1).addmv_(matrix, weights)
            else:
                sums[name] = torch.mv(matrix, weights).view(shape)
        pairs = self.pairs.pop(name, [])
        while pairs:
            self._add_pair_to(sums, name, pairs.pop(), factors, masked)

    def _grows_by(self, name: str) -> int:
        """Numbers that a new sum takes beyond those that its pairs give back; a table's takes most."""
        return self.shapes[name][0].numel() - sum(p.gradient.numel() + p.activation.numel() for p in self.pairs[name])

    def _add_pair_to(self, sums: dict[str, Tensor], name: str, pair: Pair, factors: Tensor, masked: Tensor | None) -> None:
        shape, dtype = self.shapes[name]
        gradient = _without(pair.gradient, masked).to(dtype)
        weights = factors.to(dtype).view(-1, 1, 1)
        if pair.is_table:
            if name not in sums:
                sums[name] = gradient.new_zeros(shape)
            rows = (gradient * weights).flatten(0, 1)
            sums[name].index_add_(0, pair.activation.flatten(), rows)
            return
        activation = _without(pair.activation, masked).to(dtype)
        if activation.shape[-1] < gradient.shape[-1]:
            activation = activation * weights
        else:
            gradient = gradient * weights
        left, right = (activation, gradient) if pair.transposed else (gradient, activation)
        left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
        if name in sums:
            sums[name].view(left.shape[0], -1).addmm_(left, right)
        else:
            sums[name] = torch.mm(left, right).view(shape)


def _masked(factors: Tensor) -> Tensor | None:
    """Units whose factor is 0, (U,); None if there are none."""
    dropped = factors == 0
    return dropped if bool(dropped.any()) else None


def _without(value: Tensor, masked: Tensor | None) -> Tensor:
    if masked is None:
        return value
    return torch.where(masked.view(-1, *(1 for _ in value.shape[1:])), torch.zeros_like(value), value)


def _with_slack(squares: Tensor, slack: Tensor) -> Tensor:
    """What makes squared norms those of norms that are larger by `slack`."""
    return slack * (slack + 2 * squares.clamp(min=0).sqrt())


def _terms(pair: Pair) -> Tensor:
    """Sum over positions of the lengths of what is added up there, (U,)."""
    lengths = _lengths(pair.gradient)
    return (lengths if pair.is_table else lengths * _lengths(pair.activation)).sum(1)


def _lengths(factor: Tensor) -> Tensor:
    """Euclidean lengths (U, T) of a factor's rows, in float32 at least."""
    return torch.linalg.vector_norm(factor, dim=2, dtype=torch.promote_types(factor.dtype, torch.float32))


def _squares(matrix: Tensor) -> Tensor:
    """Squared lengths of the rows of a matrix, without a second copy of it."""
    return torch.linalg.vector_norm(matrix, dim=1).square()
