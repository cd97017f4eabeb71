"""The rows of a micro-batch: whose they are, and that each has one loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from privzoo.errors import RunLost, UserError, first_line
from privzoo.privacy.sampling import DrawnRows, LogicalBatch, MicroBatch
from privzoo.tasks.base import Task


def refuse_other_contract(task: Task) -> None:
    """Raises UserError for a task that says whose its rows are in a way that nobody asks for any more."""
    if hasattr(task, "unit_of_row"):
        raise UserError(
            f"{type(task).__name__}.unit_of_row is not asked any more: its rows would be clipped one by one; give the "
            "task rows_of_unit."
        )


def unit_of_row(task: Task, micro_batch: MicroBatch, device: torch.device) -> Tensor | None:
    """The unit of privacy of each row of a drawn micro-batch, (R,), on `device`; None: every row is one.

    Raises:
        UserError: if units may have several rows and the micro-batch does not say whose its rows are.
    """
    if isinstance(micro_batch, DrawnRows):
        units = micro_batch.unit_of_row
        return None if units is None else units.to(device)
    if task.rows_of_unit is not None:
        raise UserError(
            "The task has units of several rows, and this micro-batch does not say whose its rows are: each would be "
            "clipped alone, and one unit move the sum by more than clip_norm; draw it by PoissonBatches."
        )
    return None


def require_loss_per_row(losses: Tensor, micro_batch: MicroBatch) -> None:
    """Raises UserError for another number of losses than of rows."""
    rows = getattr(micro_batch, "rows", None)  # of a draw; the pre-flight counts for itself
    if rows is not None and losses.shape != (rows,):
        raise UserError(
            f"Expected a loss for each of {rows} rows, found shape {tuple(losses.shape)}: each would be clipped alone, "
            "and one row move the sum by more than clip_norm; let the task's collate or losses add them up."
        )


def that_fits(query: Callable[[LogicalBatch], Any], batch: LogicalBatch, again: bool) -> Any:
    """What `query` answers; where memory runs out once more from its beginning, with the same draw in smaller micro-batches.

    Nothing has been released before, and dropout's masks hang on examples, not on micro-batches.

    Args:
        again: whether it may be asked again.
    Raises:
        RunLost: if it may not, or micro-batches can be no smaller.
    """
    while True:
        try:
            return query(batch)
        except torch.OutOfMemoryError as error:
            smaller = batch.smaller() if again else None
            if smaller is None:
                raise RunLost(
                    f"Memory ran out ({first_line(error)}): go on with resume=<run folder> and a smaller "
                    "microbatch_size, or trainer.gradient_checkpointing=true."
                ) from error
        batch = smaller  # here, where what the error held is free
        torch.cuda.empty_cache()
