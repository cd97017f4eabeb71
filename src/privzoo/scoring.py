"""The task's metrics of a model, on the validation split."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig

from privzoo.methods.base import PrivateMethod
from privzoo.privacy.sampling import MicroBatch
from privzoo.tasks.base import Task


def evaluate_now(method: PrivateMethod, cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """The task's metrics of the model as it is, or of the average of its weights, on the validation split."""
    with method.published():
        return score(method.task, method.model, cfg, device)


def score(task: Task, model: Any, cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """The task's metrics of a model on the validation split, in the precision that the run trains in."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
        return task.evaluate(model, _validation_batches(task, cfg.microbatch_size, device))


def _validation_batches(task: Task, microbatch_size: int, device: torch.device) -> Iterator[MicroBatch]:
    """The whole validation split in micro-batches of like length, on the device."""
    order = task.by_length(task.validation)
    for first in range(0, len(order), microbatch_size):
        rows = [task.validation[i] for i in order[first : first + microbatch_size]]
        yield {name: value.to(device) for name, value in task.collate(rows).items()}
