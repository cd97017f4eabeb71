"""A method on the validation split, timed: see `privzoo.rehearsal`, which runs this in a process of its own."""

import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from privzoo.errors import RunLost
from privzoo.preparing import method_of, model_of, task_of
from privzoo.privacy.callback import PrivacyCallback
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import Phase, PrivacyPlan, default_delta
from privzoo.privacy.ranks import ALONE
from privzoo.privacy.sampling import DrawnRows, LogicalBatch, PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey
from privzoo.rehearsal import RELEASES, Cost, Tried
from privzoo.results import peak_memory_bytes
from privzoo.surroundings import device_of, quiet_libraries

MICRO_BATCHES = 4  # of a rehearsed release, in the mean
PASS_S = 20.0  # of a pass over the validation rows, at most
NOTHING = LogicalBatch(0, ())


class Stage:
    """The method of a configuration, with the validation split in the place of the training split.

    Args:
        cfg: of the run; of several processes this is one, which holds the whole model.
    Raises:
        UserError: for what `train` would refuse.
    """

    def __init__(self, cfg: DictConfig) -> None:
        quiet_libraries()
        self.cfg = deepcopy(cfg)
        self.cfg.trainer.devices, self.cfg.trainer.strategy = 1, "replicas"
        if self.cfg.method.get("adaptive") is not None:
            self.cfg.method.adaptive = None  # it costs nothing, and asks for a sigma that suits the batch
        self.task = task_of(self.cfg)
        self.loaded = model_of(self.cfg, self.task)
        self.rows_per_unit = len(self.task.train) / self.task.num_examples
        self.training_rows = self.task.train
        self.rows = self.task.train = self.task.validation  # nothing is computed with training rows
        self.task.rows_of_unit = None
        self.device = device_of(self.cfg)
        self.method: Any = None

    def tried(self, size: int) -> Tried | None:
        """A micro-batch of the longest rows; None if it does not fit."""
        try:
            self._begin(size)
            besides, seconds = self._seconds(NOTHING), self._seconds(self._longest(size))
        except torch.OutOfMemoryError:
            return None
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
        return Tried(size, max(seconds - besides, 1e-9) / size, self._peak(), memory)

    def cost(self, size: int, folder: Path) -> Cost:
        """A few releases by the Trainer, as in a run, and a micro-batch of the longest rows.

        Raises:
            MemoryError: if they do not fit on a GPU.
        """
        try:
            return self._cost(size, folder)
        except (torch.OutOfMemoryError, RunLost) as error:
            raise MemoryError from error

    def _cost(self, size: int, folder: Path) -> Cost:
        self._begin(size)
        self._pass_over(size)
        self._query(self._longest(size))
        draws = PoissonDraws(self.plan, self.method.mechanism.key, self.method.mechanism.digest)
        batches = PoissonBatches(self.rows, draws, self.task.collate, self.task.length, size)
        watch = _Watch(self.method)
        with Ledger(folder / "ledger.jsonl") as ledger:
            trainer = Trainer(
                devices=1, accelerator=self.cfg.trainer.accelerator, precision=self.cfg.trainer.precision, max_epochs=1,
                logger=False, callbacks=[PrivacyCallback(self.plan, ledger, self.method.mechanism.digest), watch],
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(self.method, private_loader(batches))
        self.method.query = watch.query
        self._query(self._longest(size))  # once more, beside the optimizer's state
        empty = self._seconds(NOTHING)
        queries, rows, wholes = watch.queries[1:], sum(watch.rows[1:]), watch.wholes[1:]
        per_row = max(sum(queries) - len(queries) * empty, 0.0) / max(rows, 1)
        besides = statistics.median(whole - query for whole, query in zip(wholes, queries, strict=True)) + empty
        relative_length = self._mean_length(self.training_rows) / self._mean_length(self.rows)
        return Cost(size, self.rows_per_unit, relative_length, per_row, besides, self._peak(), *self._to_deal_out())

    def _to_deal_out(self) -> tuple[int, int, int, int]:
        """Bytes of weights, trained weights, clipped sums and optimizer state."""
        trained = self.method.active.values()
        sums = 0 if hasattr(self.method, "walker") else sum(4 * p.numel() for p in trained)
        state = [value for each in self.method.made.state.values() for value in each.values() if torch.is_tensor(value)]
        weights = sum(p.nbytes for p in self.method.model.parameters())
        return weights, sum(p.nbytes for p in trained), sums, sum(value.nbytes for value in state)

    @torch.no_grad()
    def _pass_over(self, size: int) -> None:
        """Losses of all rows, for some time at most: a run scores the model first, which leaves memory in more pieces. (To
        score would be to generate answers, with some tasks.)"""
        collate = self.task.collate
        order, began = self.task.by_length(self.rows), time.monotonic()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.trainer.precision == "bf16-mixed"):
            for first in range(0, len(order), size):
                numbers = order[first : first + size]
                drawn = [self.rows[number] for number in numbers]
                self.method.losses(DrawnRows(collate(drawn), len(drawn), 0, numbers))
                if time.monotonic() - began > PASS_S:
                    return

    def _mean_length(self, rows: Any) -> float:
        return statistics.fmean(self.task.length(rows[number]) for number in range(len(rows)))

    def _begin(self, size: int) -> None:
        """Once: a plan over the validation rows with the run's own clip norm, noise of some size, and the method."""
        if self.method is not None:
            return
        cfg, count = self.cfg, len(self.rows)
        batch_size = max(1, min(cfg.batch_size, MICRO_BATCHES * size, count))
        private = cfg.eps is None or not math.isinf(cfg.eps)
        noise = 1.0 if private else None
        clips = [float(phase.get("clip_norm", cfg.clip_norm)) for phase in cfg.method.get("phases") or [{}]]
        first, *later = [Phase(batch_size, RELEASES * batch_size / count, clip, noise) for clip in clips]
        self.plan = PrivacyPlan(
            num_examples=count, delta=default_delta(count), epsilon=None if private else math.inf, then=tuple(later),
            noise=cfg.privacy.noise, **asdict(first),
        )  # fmt: skip
        mechanism = NoiseMechanism(self.plan, RunKey.for_tests(0), "rehearsal")
        self.method = method_of(cfg, self.task, self.loaded, mechanism, ALONE, self.device)
        self._make_optimizer_state()

    def _make_optimizer_state(self) -> None:
        """As large as after a release; what it does to the weights is of no matter here."""
        optimizer = self.method.configure_optimizers()["optimizer"]
        for parameter in self.method.active.values():
            parameter.grad = None if hasattr(self.method, "walker") else torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _longest(self, size: int) -> LogicalBatch:
        longest = sorted(self.task.by_length(self.rows)[-size:])
        rows = [self.rows[number] for number in longest]
        return LogicalBatch(0, (DrawnRows(self.task.collate(rows), len(rows), 0, longest),))

    def _query(self, batch: LogicalBatch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.trainer.precision == "bf16-mixed"):
            self.method.query(batch)

    def _seconds(self, batch: LogicalBatch) -> float:
        """The fastest of a few, after one that finds caches cold."""
        self._query(batch)
        return min(self._timed(batch) for _ in range(2))

    def _timed(self, batch: LogicalBatch) -> float:
        began = _now(self.device)
        self._query(batch)
        return _now(self.device) - began

    def _peak(self) -> int:
        return peak_memory_bytes(torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None)


class _Watch(Callback):
    """Seconds of each release, whole and of its query alone, and its rows."""

    def __init__(self, method: Any) -> None:
        self.wholes: list[float] = []
        self.queries: list[float] = []
        self.rows: list[int] = []
        self.device = method.device
        self.query: Callable[[LogicalBatch], Any] = method.query
        method.query = self._timed

    def _timed(self, batch: LogicalBatch) -> Any:
        began = _now(self.device)
        found = self.query(batch)
        self.queries.append(_now(self.device) - began)
        self.rows.append(sum(getattr(each, "rows", 0) for each in batch.micro_batches))
        return found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = _now(pl_module.device)
        self.wholes.append(now - self.ended)
        self.ended = now


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
