"""Products of Gram matrices: the squared norm of sum_t left[t] ⊗ right[t] without ever forming it.

|| sum_t l_t ⊗ r_t ||^2 = sum_{s,t} (l_s · l_t)(r_s · r_t). Only the lower block triangle is reckoned, the rest is its mirror
image. Shapes: U units, T positions, a and b the widths.

Source: Li et al. 2022 (ghost norm); Rochette et al. 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 32  # positions; on a CPU the products of smaller blocks cost more than they save


def squared_norms(left: Tensor, rights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Squared norms (U,) of `left` (U, T, a) against each of `rights` (U, T, b_k), added up.

    All factors that meet one activation (query, key and value of attention) share its Gram matrix.

    Args:
        dtype: to multiply in.
    """
    left, rights = left.to(dtype), [right.to(dtype) for right in rights]
    positions = left.shape[1]
    total = left.new_zeros(len(left))
    for first in range(0, positions, _BLOCK):
        stop = min(first + _BLOCK, positions)
        own = _rows_against(left, first, stop)
        others = _rows_against(rights[0], first, stop)
        for right in rights[1:]:
            torch.baddbmm(others, right[:, first:stop], right[:, :stop].transpose(1, 2), out=others)
        product = own.mul_(others)
        total += 2 * product[:, :, :first].flatten(1).sum(1) + product[:, :, first:].flatten(1).sum(1)
    return total


def inner_products(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """< sum_s l_s ⊗ r_s , sum_t l'_t ⊗ r'_t > per unit, (U,), of two uses (l, r) and (l', r') of one parameter, in float64.

    A left factor of integers (U, T) stands for one-hot rows: a look-up in a table.
    """
    gradients = torch.bmm(left[1].double(), right[1].double().transpose(1, 2))
    return (_one_hot_products(left[0], right[0]) * gradients).flatten(1).sum(1)


def table_squared_norms(ids: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Squared norm (U,) of a table's gradient: rows that one unit looked up several times are added up first. In float32 at
    least, as the sum that is clipped by it.

    Args:
        ids: (U, T), rows of the table.
        gradient: (U, T, b), of the rows that were looked up.
        size: rows of the table.
    """
    units = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    pairs, place = torch.unique(ids + units * size, return_inverse=True)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    rows = gradient.new_zeros(len(pairs), gradient.shape[-1])
    rows.index_add_(0, place.flatten(), gradient.flatten(0, 1))
    squares = rows.square().sum(1)
    return squares.new_zeros(len(ids)).index_add_(0, pairs // size, squares)


def _rows_against(factor: Tensor, first: int, stop: int) -> Tensor:
    """Gram matrix rows first..stop against 0..stop: (U, stop - first, stop)."""
    return torch.bmm(factor[:, first:stop], factor[:, :stop].transpose(1, 2))


def _one_hot_products(left: Tensor, right: Tensor) -> Tensor:
    """l_s · l'_t for every pair of positions, (U, T, T')."""
    if not left.is_floating_point() and not right.is_floating_point():
        return (left.unsqueeze(2) == right.unsqueeze(1)).double()
    if not left.is_floating_point():
        return _one_hot_products(right, left).transpose(1, 2)
    if not right.is_floating_point():
        return left.gather(2, right.unsqueeze(1).expand(-1, left.shape[1], -1)).double()
    return torch.bmm(left.double(), right.double().transpose(1, 2))
