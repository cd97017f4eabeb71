"""Where the examples lie in the tensors of a model: proved from gradients, never guessed.

If row i of a tensor belongs to example i alone, its gradient scales with the weight of example i's loss. A few more
backward passes, with weights and without, show it for every tensor that carries a gradient; where no layout passes, examples
are mixed.
"""

from collections.abc import Hashable, Sequence, Set

import torch
from torch import Tensor

from privzoo.errors import UserError

# In the order of preference where a tensor has no gradient yet and all of them pass.
LAYOUTS = ("batch first", "batch second", "positions first")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of squared norms; else 1e-2


class UnsupportedUse(UserError):
    """A trainable parameter is used in a way that the engine cannot treat exactly."""


def possible(shape: torch.Size, rows: int, layout: str) -> bool:
    """True if a tensor of this shape can hold `rows` examples so.

    - "batch first": (R, …) or (R * k, …), all k of an example together (windows; positions flattened into rows)
    - "batch second": (T, R, …)
    - "positions first": (T * R, …), the examples taking turns
    """
    if layout == "batch first":
        return len(shape) > 0 and shape[0] % rows == 0
    if layout == "batch second":
        return len(shape) > 2 and shape[1] == rows
    return len(shape) == 2 and shape[0] > rows and shape[0] % rows == 0


def rows_first(value: Tensor, rows: int, layout: str) -> Tensor:
    """(R, …): the examples first, whatever the layout; a view where that is possible."""
    if layout == "batch second":
        return value.transpose(0, 1)
    if layout == "positions first":
        return value.reshape(-1, rows, *value.shape[1:]).transpose(0, 1)
    return value if value.shape[0] == rows else value.reshape(rows, -1, *value.shape[1:])


class Layouts:
    """What was proved so far, by tensor; a tensor is known by parameter and how many times it was used before.

    With one row there is nothing to prove: all of a tensor is that row's.
    """

    def __init__(self) -> None:
        self.proved: dict[Hashable, str] = {}
        self.unreached: set[Hashable] = set()  # the losses did not depend on them
        self.closed = False  # set where several processes make every pass together: none may make more for a proof
        self._plain: dict[tuple[Hashable, str], Tensor] = {}
        self._weighted: list[dict[tuple[Hashable, str], Tensor]] = []
        self._precision: dict[Hashable, torch.dtype] = {}

    def of(self, key: Hashable, shape: torch.Size, rows: int) -> str:
        """The layout to read a tensor in.

        Raises:
            UnsupportedUse: if examples cannot lie so in this shape.
        """
        layout = self.proved.get(key)
        if layout is None:
            layout = next((each for each in LAYOUTS if possible(shape, rows, each)), "batch first")
        if not possible(shape, rows, layout):
            raise UnsupportedUse(
                f"{_name(key)} gives shape {tuple(shape)}, where {rows} examples cannot lie {layout}: no example axis."
            )
        return layout

    def measure(self, key: Hashable, gradient: Tensor, rows: int, turn: int, layouts: Sequence[str] = LAYOUTS) -> None:
        """Note the squared norm of each example's part under every layout that this shape allows.

        Args:
            turn: 0 for plain losses, k for the k-th of `proof_weights`.
        """
        self._precision[key] = gradient.dtype
        while len(self._weighted) < turn:
            self._weighted.append({})
        noted = self._weighted[turn - 1] if turn else self._plain
        for layout in layouts:
            if possible(gradient.shape, rows, layout):
                parts = rows_first(gradient, rows, layout).reshape(rows, -1)
                noted[key, layout] = parts.to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(1)

    def conclude(self, weights: Sequence[Tensor], keys: Set[Hashable]) -> None:
        """Keep the layouts in which every example's part scaled with its own weight.

        Args:
            keys: what a gradient may arrive at.
        Raises:
            UnsupportedUse: naming a parameter at which no layout does, or at which non-finite gradients hide it.
        """
        largest = max((float(found.nan_to_num(0, 0, 0).max()) for found in self._plain.values()), default=0.0)
        for key, precision in self._precision.items():
            tolerance = _TOLERANCE.get(precision, 1e-2)
            noise = (1e-2 * tolerance) ** 2 * largest  # gradients that are 0 but for rounding scale with nothing
            seen = [layout for layout in LAYOUTS if (key, layout) in self._plain]
            fits = [layout for layout in seen if self._scales((key, layout), weights, tolerance, noise)]
            if not fits:
                raise UnsupportedUse(
                    f"{_name(key)}: no axis of its output holds one example each; the model mixes examples there, or is "
                    "laid out in a way that BookKeeping does not know."
                )
            # A poisoned example is one row in the right layout; in a wrong one it may hide them all.
            shown = {each: int((self._plain[key, each].nan_to_num(0, 0, 0) > noise).sum()) for each in fits}
            best = max(fits, key=lambda each: shown[each])  # the first of equals
            if shown[best] or len(seen) == 1:
                self.proved[key] = best
            elif not bool(torch.isfinite(self._plain[key, best]).all()):
                raise UnsupportedUse(f"{_name(key)}: gradients that are not finite hide where the examples lie.")
        self.unreached |= keys - self._precision.keys()
        self._plain, self._weighted, self._precision = {}, [], {}

    def _scales(self, at: tuple[Hashable, str], weights: Sequence[Tensor], tolerance: float, noise: float) -> bool:
        plain = self._plain[at]
        for noted, each in zip(self._weighted, weights, strict=True):
            if at not in noted:
                return False
            expected = plain * each.to(plain.dtype).square()
            close = (noted[at] - expected).abs() <= tolerance * expected + noise * float(each.max()) ** 2
            if not bool((close | ~torch.isfinite(expected)).all()):
                return False
        return True


def proof_weights(rows: int, device: torch.device) -> list[Tensor]:
    """Weights of the losses, (R,) each, that tell any two rows apart: digits to base 16 of their numbers.

    Powers of two, so that gradients scale without rounding in every floating format.
    """
    turns, left = [], torch.arange(rows, device=device)
    while True:
        turns.append(2.0 ** (left % 16 - 8))
        left = left // 16
        if not bool(left.any()):
            return turns


def _name(key: Hashable) -> str:
    return str(key[0]) if isinstance(key, tuple) else str(key)
