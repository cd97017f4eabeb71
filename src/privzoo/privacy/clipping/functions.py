"""Clipping functions: how long a unit's contribution may stay, given the norm of its gradient.

One seam, which every engine asks: `function(norms, clip_norm)` gives factors f with ||f_i g_i|| <= C, whatever the gradients
are. So sigma and the account are the same for all of them; what differs is how a short gradient counts. An own function is
one more callable; the pre-flight checks on norms of every size that it keeps the bound.

>>> norms = torch.tensor([0.0, 0.5, 2.0])
>>> for function in (Flat(), AutoS(stability=0.5), AutoV()):
...     print((norms * function(norms, clip_norm=1.0)).tolist())
[0.0, 0.5, 1.0]
[0.0, 0.5, 0.800000011920929]
[0.0, 1.0, 1.0]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.privacy.clipping.engine import clip_factors

ClippingFunction = Callable[[Tensor, float], Tensor]

# Squares below about 1e-38 are lost in float32, so that a gradient may be longer than its norm says by as much as 1e-14
# (1e10 coordinates). Flat clipping does not lengthen it; a factor of C / norm would.
SMALLEST_NORM = 1e-12
_PROBES = (0.0, 1e-30, 1e-13, 1e-8, 1e-3, 0.1, 0.9, 1.0, 1.1, 10.0, 1e3, 1e8, 1e18, 1e30, math.nan, math.inf)


@dataclass(frozen=True)
class Flat:
    """Abadi's clipping, f_i = min(1, C / ||g_i||): a gradient within C is left as it is. See `clip_factors`.

    Source: Abadi et al. 2016, Algorithm 1.
    """

    def __call__(self, norms: Tensor, clip_norm: float) -> Tensor:
        """Factors (U,) of norms (U,)."""
        return clip_factors(norms, clip_norm)


FLAT = Flat()


@dataclass(frozen=True)
class AutoS:
    """Automatic clipping with a stability constant, f_i = C / (||g_i|| + gamma): every gradient is scaled, so C is only a
    unit of the learning rate and needs no search.

    ||f_i g_i|| = C ||g_i|| / (||g_i|| + gamma) < C up to rounding, and short gradients stay shorter than long ones. Norms
    that are not finite give 0. clip_norm=inf scales nothing: the twin without privacy is ordinary training.

    Args:
        stability: gamma > 0, in the unit of the gradient norms.
    Raises:
        UserError: if stability is below 1e-12.
    Source: Bu et al. 2023, AUTO-S.
    """

    stability: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.stability, (int, float)) or not SMALLEST_NORM <= self.stability < math.inf:
            raise UserError(f"Expected clipping.stability={self.stability} to be a number of at least {SMALLEST_NORM:g}.")

    def __call__(self, norms: Tensor, clip_norm: float) -> Tensor:
        """Factors (U,) of norms (U,)."""
        return _scaled(norms, norms + self.stability, clip_norm)


@dataclass(frozen=True)
class AutoV:
    """Automatic clipping without a constant, f_i = C / ||g_i||: every gradient is made as long as C.

    A norm below 1e-12 counts as 1e-12, so a zero gradient stays zero and one that float32 cannot measure stays within C.
    Rounding errors of a gradient that is nearly zero become as long as C, too; the pre-flight refuses where engines then
    differ, and `AutoS` is the way out. Non-finite norms give 0. clip_norm=inf scales nothing.

    Source: Bu et al. 2023, AUTO-V.
    """

    def __call__(self, norms: Tensor, clip_norm: float) -> Tensor:
        """Factors (U,) of norms (U,)."""
        return _scaled(norms, norms.clamp(min=SMALLEST_NORM), clip_norm)


def _scaled(norms: Tensor, divisors: Tensor, clip_norm: float) -> Tensor:
    if math.isinf(clip_norm):
        return clip_factors(norms, clip_norm)
    if not clip_norm > 0:
        raise ValueError(f"Expected clip_norm={clip_norm} > 0.")
    return torch.where(torch.isfinite(norms), clip_norm / divisors, torch.zeros_like(norms))


def check_function(function: ClippingFunction) -> None:
    """Try a clipping function on norms of every size.

    Passing means: ||f_i g_i|| <= C for each, a norm that is not finite gives 0, clip_norm=inf scales nothing, and no factor
    hangs on the norms of other units (which would couple them, and the bound would be gone).

    Raises:
        UserError: naming the norm.
    """
    norms = torch.tensor(_PROBES)
    for clip_norm in (1e-3, 1.0, 50.0):
        factors = function(norms, clip_norm)
        alone = torch.cat([function(norm.view(1), clip_norm) for norm in norms])
        for norm, factor, own in zip(_PROBES, factors.tolist(), alone.tolist(), strict=True):
            within = norm * factor <= clip_norm * (1 + 1e-6) if math.isfinite(norm) else factor == 0
            if not math.isclose(factor, own, rel_tol=1e-6) or factor < 0 or not within:
                raise UserError(
                    f"{function} gives a gradient of norm {norm:g} the factor {factor:g} ({own:g} where it is alone) at "
                    f"clip_norm={clip_norm:g}: a contribution must stay within clip_norm, whatever the others are."
                )
    finite = norms[norms.isfinite()]
    if not bool((function(finite, math.inf) == 1).all()):
        raise UserError(f"Expected {function} to scale nothing at clip_norm=inf, the twin without privacy.")
