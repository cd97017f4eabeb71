"""The progress bar of a run: releases, epsilon, speed, time left; in place of Lightning's own."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from privzoo.reporting.display import duration, number

REDRAW_S = 0.25  # least time between two redraws of the bar
LINE_S = 30.0  # longest time between two lines where there is no terminal
LINE_SHARE = 0.1  # a line at each tenth of the run, too
EPSILON_SHARE = 0.05  # at most this share of the time goes into computing epsilon
BAR_WIDTH = 8
SMOOTHING = 0.9  # of private/loss, a release


class Planned(Protocol):
    """What the bar asks of a plan; epsilon is inf for a run without privacy."""

    @property
    def steps(self) -> int: ...

    @property
    def epsilon(self) -> float | None: ...

    def expected_examples(self, count: int) -> int: ...


class Progress(Callback):
    """Shows where a run is, on rank zero: a bar on a terminal, else a line every 30 s and at each tenth of the run.

    Speed is the expected batch over the time of a release, as it was since this process began, so that it says nothing
    about drawn batches and a resumed run has an honest time left. `private/loss` (smoothed) is an exact statement about
    drawn examples: it is shown on a terminal, marked with its full name, and never in lines, which end up in log files.

    Args:
        plan: the plan of the run.
        epsilon_at: releases made to epsilon spent. It may be slow: it is asked only so often that it takes 5 % of the
            time at most.
        metric: name in `trainer.callback_metrics` to show; None shows the first `validation/...` there is.
        console: where to draw; None is the standard output.
    """

    def __init__(
        self,
        plan: Planned,
        epsilon_at: Callable[[int], float],
        metric: str | None = None,
        console: Console | None = None,
    ) -> None:
        self.plan = plan
        self.epsilon_at = epsilon_at
        self.metric = metric
        self.console = console
        self._bar: Bar | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar (or, where there is no terminal, the lines)."""
        if not trainer.is_global_zero:
            return
        self._out = self.console or Console(force_terminal=sys.stdout.isatty())  # FORCE_COLOR would write to files
        self._first, self._since = trainer.global_step, time.monotonic()
        self._loss: float | None = None
        self._epsilon, self._ask_after = "", 0.0
        self._drawn, self._drawn_at_step = self._since, self._first
        if self._out.is_terminal:
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            self._bar = Bar(
                BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
                text,
                console=self._out,
                refresh_per_second=4,
            )
            self._task: TaskID = self._bar.add_task("", total=self.plan.steps, completed=self._first)
            self._bar.start()
        self._draw(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows a release that was made; the private loss is seen here alone."""
        if not trainer.is_global_zero:
            return
        loss = getattr(pl_module, "private_metrics", {}).get("private/loss")
        if loss is not None:
            self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        waited = time.monotonic() - self._drawn
        if self._bar is not None:
            due = waited >= REDRAW_S
        else:
            tenth = max(1.0, LINE_SHARE * self.plan.steps)
            due = waited >= LINE_S or trainer.global_step // tenth > self._drawn_at_step // tenth
        if due or trainer.global_step == self.plan.steps:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        """Leaves the last state on the screen and gives the cursor back, also after an exception or Ctrl-C."""
        if self._bar is not None:
            self._draw(trainer)
            self._bar.stop()
            self._bar = None

    def _draw(self, trainer: Trainer) -> None:
        step = trainer.global_step
        self._drawn, self._drawn_at_step = time.monotonic(), step
        shows_private = self._bar is not None and self._loss is not None
        left, speed = self._speed(step)
        private = f"private/loss {self._loss:.3f}" if shows_private else ""
        release = f"release {step:,}/{self.plan.steps:,}"
        # Least wanted last: that is what a narrow terminal cuts off.
        parts = (release, self._epsilon_text(step), left, self._metric_text(trainer), private, speed)
        text = " · ".join(part for part in parts if part)
        if self._bar is None:
            self._out.print(text, highlight=False, soft_wrap=True)
        else:
            self._bar.update(self._task, completed=step, description=text)

    def _epsilon_text(self, step: int) -> str:
        if self.plan.epsilon == float("inf"):
            return "non-private"
        began = time.monotonic()
        if began >= self._ask_after or step == self.plan.steps:
            self._epsilon = f"ε {self.epsilon_at(step):.2f}/{number(self.plan.epsilon)}"
            ended = time.monotonic()
            self._ask_after = ended + (ended - began) / EPSILON_SHARE
        return self._epsilon

    def _speed(self, step: int) -> tuple[str, str]:
        """Time left and examples a second; empty before the first release of this process."""
        made, taken = step - self._first, time.monotonic() - self._since
        if made == 0:
            return "", ""
        drawn = self.plan.expected_examples(step) - self.plan.expected_examples(self._first)
        left = (self.plan.steps - step) * taken / made
        return f"{duration(left)} left", f"{drawn / taken:,.0f} ex/s"

    def _metric_text(self, trainer: Trainer) -> str:
        metrics = trainer.callback_metrics
        name = self.metric or next((name for name in metrics if name.startswith("validation/")), None)
        if name is None or name not in metrics:
            return ""
        return f"{name.removeprefix('validation/')} {number(float(metrics[name]))}"
