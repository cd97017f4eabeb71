"""Poisson sampling and the logical batch: one draw is one Lightning batch is one release."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.streams import RunKey

MicroBatch = dict[str, Tensor]


class DrawnRows(dict[str, Tensor]):
    """A micro-batch that remembers how many rows it is of, whatever was made of them, and which.

    Args:
        collated: what the task made of the rows.
        rows: how many.
        release: that they were drawn for.
        examples: their numbers in the training split.
    """

    def __init__(self, collated: MicroBatch, rows: int, release: int, examples: Sequence[int]) -> None:
        super().__init__(collated)
        self.rows, self.release, self.examples = rows, release, examples


@dataclass(frozen=True)
class LogicalBatch:
    """One Poisson draw, cut into micro-batches of similar length. It may be empty.

    Attributes:
        release: index of the release that the draw is for.
        micro_batches: collated rows, longest first, so that a batch that does not fit fails at once.
    """

    release: int
    micro_batches: tuple[MicroBatch, ...]


class PoissonDraws:
    """Draws of the plan: in each, every example takes part independently with probability q.

    Args:
        plan: gives N and q.
        key: the run's secret; draws are its "sampling" streams.
        digest: `RunKey.digest` of the run.
    """

    def __init__(self, plan: PrivacyPlan, key: RunKey, digest: str) -> None:
        self.plan = plan
        self.key = key
        self.digest = digest

    def __call__(self, release: int) -> np.ndarray:
        """Indices of the examples in this release's draw, ascending, shape (realised batch,)."""
        uniform = self.key.stream("sampling", release, self.digest).random(self.plan.num_examples)
        return np.flatnonzero(uniform < self.plan.at(release).sample_rate)


class PoissonBatches(Dataset[LogicalBatch]):
    """Item t is the logical batch of release t.

    Args:
        rows: the encoded private training split.
        draws: which rows take part.
        collate: rows to one padded micro-batch; never called with no rows.
        length: sort key of a row (tokens).
        microbatch_size: rows a micro-batch at most; memory only.
    Raises:
        ValueError: if the plan was made for another number of rows.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        draws: PoissonDraws,
        collate: Callable[[list[Any]], MicroBatch],
        length: Callable[[Any], int],
        microbatch_size: int,
    ) -> None:
        if len(rows) != draws.plan.num_examples:
            raise ValueError(f"Expected {draws.plan.num_examples} rows, as in the plan, found {len(rows)}.")
        self.rows = rows
        self.draws = draws
        self.collate = collate
        self.length = length
        self.microbatch_size = microbatch_size

    def __len__(self) -> int:
        return self.draws.plan.steps

    def __getitem__(self, release: int) -> LogicalBatch:
        drawn = [(int(i), self.rows[int(i)]) for i in self.draws(release)]
        drawn.sort(key=lambda each: self.length(each[1]), reverse=True)
        starts = range(0, len(drawn), self.microbatch_size)
        parts = [drawn[i : i + self.microbatch_size] for i in starts]
        return LogicalBatch(release, tuple(self._micro_batch(release, part) for part in parts))

    def _micro_batch(self, release: int, part: list[tuple[int, Any]]) -> DrawnRows:
        collated = self.collate([row for _, row in part])
        return DrawnRows(collated, len(part), release, [number for number, _ in part])


class ReleaseOrder(Sampler[int]):
    """Release indices from `start` to the end of the plan; its length stays T, as Lightning counts batches from 0."""

    def __init__(self, steps: int, start: int = 0) -> None:
        self.steps = steps
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.steps))

    def __len__(self) -> int:
        return self.steps


def private_loader(batches: PoissonBatches, start: int = 0) -> DataLoader:
    """A loader of the releases from `start` on; the only kind that `PrivacyCallback` accepts."""
    return DataLoader(batches, batch_size=None, sampler=ReleaseOrder(len(batches), start), collate_fn=_as_it_is)  # type: ignore[arg-type]


def _as_it_is(batch: LogicalBatch) -> LogicalBatch:
    return batch
