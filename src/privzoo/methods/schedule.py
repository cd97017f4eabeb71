"""The learning rate of every release."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from privzoo.errors import UserError
from privzoo.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of a release's public index alone.

    Args:
        plan: says how many releases there are, and in which phases.
        highest: the learning rate of each phase at its highest.
        schedule: "linear" (to 0 at the last release) or "constant"; begins anew with each phase.
        warmup: part of a phase's releases over which it rises from 0.
    Raises:
        UserError: for a schedule that is not known, a warmup outside [0, 1).
    """

    plan: PrivacyPlan
    highest: Sequence[float]
    schedule: str
    warmup: float

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "constant"):
            raise UserError(f"Expected method.schedule={self.schedule} to be linear or constant.")
        if not isinstance(self.warmup, (int, float)) or not 0 <= self.warmup < 1:
            raise UserError(f"Expected 0 <= method.warmup={self.warmup} < 1.")

    def at(self, release: int) -> float:
        """After the last release: 0 under "linear", else the last one's."""
        if release >= self.plan.steps:
            return 0.0 if self.schedule == "linear" else self.highest[-1]
        setting = self.plan.at(release)
        return self.highest[setting.phase] * self._part(setting.index, setting.steps)

    def _part(self, index: int, steps: int) -> float:
        rising = math.ceil(self.warmup * steps)
        if index < rising:
            return (index + 1) / (rising + 1)
        return 1.0 if self.schedule == "constant" else (steps - index) / (steps - rising)
