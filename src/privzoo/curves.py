"""Epsilon along a run, and the public curves."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from privzoo.methods.first_order import FirstOrder
from privzoo.privacy.accounting import SEARCH_GRID
from privzoo.privacy.plan import PrivacyPlan

POINTS = 20


class EpsilonCurve:
    """Epsilon after t releases of a plan, at `POINTS` places; in between the next place's, so never too little.

    Args:
        plan: whose releases are made in order.
        charged_twice: releases that earlier sessions paid for and that this one pays for again.
    """

    def __init__(self, plan: PrivacyPlan, charged_twice: int = 0) -> None:
        self.plan = plan
        self.charged_twice = charged_twice
        self._known: dict[int, float] = {0: 0.0}

    def __call__(self, releases: int) -> float:
        if POINTS not in self._known:
            self._known[POINTS] = self.plan.epsilon_after(self.plan.steps)
        releases = min(releases + self.charged_twice, self.plan.steps) if releases else 0
        place = -(-releases * POINTS // self.plan.steps)
        if place not in self._known:
            count = min(self.plan.steps, -(-place * self.plan.steps // POINTS))
            # The coarse grid is three times faster and up to 0.3 % too high: capped by the whole run's epsilon.
            self._known[place] = min(self._known[POINTS], self.plan.epsilon_after(count, SEARCH_GRID))
        return self._known[place]


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
        step = trainer.global_step
        speed = (step - self.first) * self.plan.at(step - 1).batch_size / max(time.monotonic() - self.since, 1e-9)
        assert isinstance(pl_module, FirstOrder)
        lr = pl_module.lr * pl_module.lr_factor(step - 1)
        values = {"lr": lr, "examples_per_s": speed, **pl_module.private_metrics}
        if self.plan.private:
            values["epsilon"] = self.epsilon_at(step)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
