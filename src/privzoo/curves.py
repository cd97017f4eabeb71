"""Epsilon along a run, and the public curves."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from privzoo.methods.base import PrivateMethod
from privzoo.privacy.accounting import SEARCH_GRID, Releases, epsilon_spent
from privzoo.privacy.plan import PrivacyPlan

POINTS = 20


class EpsilonCurve:
    """Epsilon after t releases of a plan, at `POINTS` places; in between the next place's, so never too little.

    Args:
        plan: whose releases are made in order.
        paid_twice: releases that earlier sessions paid for and that this one pays for again. The run then ends early, within
            the plan's epsilon.
    """

    def __init__(self, plan: PrivacyPlan, paid_twice: Releases = ()) -> None:
        self.plan = plan
        self.paid_twice = list(paid_twice)
        self._known: dict[int, float] = {}

    def __call__(self, releases: int) -> float:
        place = -(-releases * POINTS // self.plan.steps)
        if place not in self._known:
            self._known[place] = self._at(min(self.plan.steps, -(-place * self.plan.steps // POINTS)))
        return self._known[place]

    def _at(self, count: int) -> float:
        # The coarse grid is three times faster and up to 0.3 % too high: capped by what the run costs in the end.
        coarse = epsilon_spent([*self.plan.releases(count), *self.paid_twice], self.plan.delta, SEARCH_GRID)
        if self.paid_twice:
            assert self.plan.epsilon is not None
            return min(coarse, self.plan.epsilon)
        if POINTS not in self._known:
            self._known[POINTS] = self.plan.epsilon_after(self.plan.steps)
        return min(coarse, self._known[POINTS])


class Curves(Callback):
    """Logs each release: epsilon, learning rate, speed from the expected batch; loggers drop `private/…` by default.

    Args:
        epsilon_at: releases to epsilon.
    """

    def __init__(self, epsilon_at: EpsilonCurve) -> None:
        self.epsilon_at = epsilon_at
        self.plan = epsilon_at.plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first, self.since = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the release that has just been made has spent and reached."""
        step = trainer.global_step
        drawn = self.plan.expected_examples(step) - self.plan.expected_examples(self.first)
        speed = drawn / max(time.monotonic() - self.since, 1e-9)
        assert isinstance(pl_module, PrivateMethod)
        lr = pl_module.lr.at(step - 1)
        # Two digits: a release's own time would tell how many rows were drawn.
        values = {"lr": lr, "examples_per_s": float(f"{speed:.2g}"), **pl_module.public_metrics, **pl_module.private_metrics}
        if self.plan.private:
            values["epsilon"] = self.epsilon_at(step)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
