"""Checkpoints that are whole or absent, stops by Ctrl-C and SIGTERM, and validation in between."""

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from privzoo.errors import RunLost, UserError
from privzoo.files import sync_folder
from privzoo.methods.base import Interrupted, PrivateMethod
from privzoo.methods.contents import seal_of
from privzoo.privacy.streams import RunKey


class Checkpoints(Callback):
    """Saves `last.ckpt` every so many releases, at the end, and when the run is stopped.

    A release that was lost since the last checkpoint is computed again on resume; on a CPU at no cost in epsilon.

    Args:
        path: file to replace.
        every: releases between two checkpoints.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.saved: int | None = None
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time up to now, over all sessions."""
        return self._seconds + time.monotonic() - self._since

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._since = self.seconds, time.monotonic()
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):
            self._seconds, self._since = self.seconds, time.monotonic()
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Replace the checkpoint by one of this moment.

        Raises:
            RunLost: if the disk refused; the former checkpoint is kept.
        """
        if self.saved == trainer.global_step:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            trainer.save_checkpoint(temporary)  # all ranks take part, the first one writes
            if not trainer.is_global_zero:
                self.saved = trainer.global_step
                return
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            sync_folder(self.path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its writer
            temporary.unlink(missing_ok=True)
            raise RunLost(
                f"The checkpoint of release {trainer.global_step} could not be written to {self.path} ({error}): make room "
                f"and go on with resume={self.path.parent}."
            ) from error
        self.saved = trainer.global_step


class Straight(TorchCheckpointIO):
    """Writes a checkpoint into its file. Lightning's own writes all of it into memory first, to be whole or absent, which
    `Checkpoints` sees to."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def load_checkpoint(path: Path, key: RunKey) -> dict[str, Any]:
    """The content of a checkpoint that the run with this key made.

    Raises:
        UserError: if the file is damaged, cut short, or from another run: what it holds would have no promise.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        seal = seal_of(checkpoint, key)
    except (RuntimeError, EOFError, OSError, AttributeError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{path} is damaged or cut short ({reason}): put back a whole copy, or remove it to compute its releases again "
            "from the start."
        ) from error
    if checkpoint.get("seal") != seal:
        raise UserError(
            f"{path} was not made by this run (its seal is wrong): put the run's own checkpoint back, or remove it to "
            "compute its releases again from the start."
        )
    return checkpoint


class StopOnSignal(Callback):
    """The first Ctrl-C or SIGTERM ends the run between two micro-batches, with a checkpoint; a second Ctrl-C at once.

    Lightning would turn Ctrl-C into SystemExit, and nothing after `fit` would run.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here until `restore` signals ask for a stop."""
        assert isinstance(pl_module, PrivateMethod)
        method = pl_module

        def ask(number: int, frame: Any) -> None:
            if self.received is not None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return  # who stops several processes may send SIGTERM to each, and once more by the command
            self.received = number
            method.stop_requested = True

        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, ask)

    def restore(self) -> None:
        """Give the signals back to who had them."""
        while self._former:
            signal.signal(*self._former.popitem())


class Validation(Callback):
    """Scores the model every so many releases; what it logs is about a split that the plan does not protect.

    Args:
        evaluate: gives the metrics of the model as it is.
        every: releases between two scores; 0 for none.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], every: int) -> None:
        self.evaluate = evaluate
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and trainer.global_step % self.every == 0:
            metrics = {f"validation/{name}": value for name, value in self.evaluate().items()}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
