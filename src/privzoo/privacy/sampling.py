"""Poisson sampling and the logical batch: one draw is one Lightning batch is one release."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import ALONE, Ranks
from privzoo.privacy.streams import RunKey

MicroBatch = dict[str, Tensor]


class DrawnRows(dict[str, Tensor]):
    """A micro-batch that remembers how many rows it is of, whatever was made of them, and whose they are.

    Args:
        collated: what the task made of the rows.
        rows: how many.
        release: that they were drawn for.
        examples: of each row, the number of its unit of privacy in the training split; all rows of a unit are here.
        places: of each row, its place among the rows of its unit; None: every row is a unit.
    """

    def __init__(
        self,
        collated: MicroBatch,
        rows: int,
        release: int,
        examples: Sequence[int],
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(collated)
        self.rows, self.release, self.examples = rows, release, examples
        self.places = [0] * len(examples) if places is None else places

    @property
    def unit_of_row(self) -> Tensor | None:
        """For an engine: the unit of each row, counted from 0 within this micro-batch, (R,); None: every row is one."""
        distinct, numbers = np.unique(self.examples, return_inverse=True)
        return None if len(distinct) == len(numbers) else torch.from_numpy(numbers)


@dataclass(frozen=True)
class LogicalBatch:
    """One Poisson draw, or a rank's share of it, cut into micro-batches of similar length. It may be empty.

    Attributes:
        release: index of the release that the draw is for.
        micro_batches: collated rows, longest first, so that a batch that does not fit fails at once.
        fillers: micro-batches to go through beside those that other ranks have more, and whose results are dropped.
        smaller: gives the same draw in micro-batches of half as many rows, or None if they can be no smaller.
    """

    release: int
    micro_batches: tuple[MicroBatch, ...]
    fillers: tuple[MicroBatch, ...] = ()
    smaller: Callable[[], "LogicalBatch | None"] = field(default=lambda: None, compare=False)


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
        microbatch_size: rows a micro-batch at most, but that a unit is never cut; memory only.
        rows_of_unit: of each unit of privacy, the numbers of its rows; None: every row is a unit. Units are drawn, with
            all their rows.
        ranks: of several processes each gets its share of the units of every draw, which all of them make.
        level: ranks with fewer micro-batches than another get fillers, for models whose passes all ranks make together.
    Raises:
        ValueError: if the plan was made for another number of units, or the rows are not dealt out to them one by one.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        draws: PoissonDraws,
        collate: Callable[[list[Any]], MicroBatch],
        length: Callable[[Any], int],
        microbatch_size: int,
        rows_of_unit: Sequence[Sequence[int]] | None = None,
        ranks: Ranks = ALONE,
        level: bool = False,
    ) -> None:
        units = len(rows if rows_of_unit is None else rows_of_unit)
        if units != draws.plan.num_examples:
            raise ValueError(f"Expected {draws.plan.num_examples} units, as in the plan, found {units}.")
        if rows_of_unit is not None:
            _check_dealt_out(rows_of_unit, len(rows))
        self.rows_of_unit = rows_of_unit
        self.ranks = ranks
        self.level = level
        self.rows = rows
        self.draws = draws
        self.collate = collate
        self.length = length
        self.microbatch_size = microbatch_size

    def __len__(self) -> int:
        return self.draws.plan.steps

    def __getitem__(self, release: int) -> LogicalBatch:
        drawn = self.draws(release)
        parts = list(self._parts(self._longest_first(drawn, self.ranks)))
        missing = self._most_parts(drawn) - len(parts) if self.level else 0
        fillers = tuple(self._micro_batch(release, [(0, self._rows_of(0))]) for _ in range(missing))
        micro_batches = tuple(self._micro_batch(release, part) for part in parts)
        return LogicalBatch(release, micro_batches, fillers, partial(self._smaller, release))

    def _smaller(self, release: int) -> LogicalBatch | None:
        """See `LogicalBatch.smaller`; later draws come so, too."""
        if self.microbatch_size == 1:
            return None
        self.microbatch_size = -(-self.microbatch_size // 2)
        return self[release]

    def _longest_first(self, drawn: np.ndarray, ranks: Ranks) -> list[tuple[int, list[Any]]]:
        """A rank's share of the draw. It is dealt out by the draw alone: what a process makes of lengths moves no unit."""
        share = [(int(unit), self._rows_of(int(unit))) for unit in ranks.share(drawn)]
        return sorted(share, key=lambda each: max(map(self.length, each[1])), reverse=True)

    def _most_parts(self, drawn: np.ndarray) -> int:
        """Of any rank's share."""
        ranks = (Ranks(rank, self.ranks.count) for rank in range(self.ranks.count))
        return max(len(list(self._parts(self._longest_first(drawn, each)))) for each in ranks)

    def _rows_of(self, unit: int) -> list[Any]:
        return [self.rows[int(row)] for row in ([unit] if self.rows_of_unit is None else self.rows_of_unit[unit])]

    def _parts(self, drawn: Sequence[tuple[int, list[Any]]]) -> Iterator[list[tuple[int, list[Any]]]]:
        """Whole units, as many as fit; one that is too large is a part by itself."""
        part: list[tuple[int, list[Any]]] = []
        for unit in drawn:
            if part and sum(len(rows) for _, rows in part) + len(unit[1]) > self.microbatch_size:
                yield part
                part = []
            part.append(unit)
        if part:
            yield part

    def _micro_batch(self, release: int, part: list[tuple[int, list[Any]]]) -> DrawnRows:
        collated = self.collate([row for _, rows in part for row in rows])
        examples = [number for number, rows in part for _ in rows]
        places = [place for _, rows in part for place in range(len(rows))]
        return DrawnRows(collated, len(examples), release, examples, places)


def _check_dealt_out(rows_of_unit: Sequence[Sequence[int]], rows: int) -> None:
    """Raises ValueError unless every row is of exactly one unit and every unit has one: of two it would move two sums."""
    seen = np.zeros(rows, dtype=np.int64)
    for unit in rows_of_unit:
        if not len(unit):
            raise ValueError("Expected every unit to have a row.")
        np.add.at(seen, np.asarray(unit), 1)
    if not bool((seen == 1).all()):
        row = int(np.flatnonzero(seen != 1)[0])
        raise ValueError(f"Expected row {row} to be of one unit, found it in {seen[row]}.")


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
