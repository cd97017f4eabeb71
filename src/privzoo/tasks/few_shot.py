"""Few-shot training splits: k rows of every class, chosen by a public seed. The protocol of Zhang et al., DPZero (2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.digest import content_digest


@dataclass(frozen=True)
class FewShot:
    """A few rows of a source's train split: `per_class` of every class, or `rows` of all; of its other splits all, or
    `test_rows`.

    Privacy: the selected rows are the data set. A promise is for them alone: who was in the source, and was not selected,
    is not covered, because one row more or less there changes who is selected.

    Args:
        source: where the rows come from.
        per_class: k, at least 1; None: `rows` says how many.
        seed: of the selection; public, and no other than this one decides it.
        rows: of the whole train split, at least 1; None: `per_class` says how many.
        fewer: whether a class with fewer than `per_class` rows gives all that it has; otherwise it is an error.
        test_rows: of every other split at most so many; None: all.
    Raises:
        UserError: neither or both of per_class and rows are given, or a number is below 1.
    """

    source: HubData | ToyData
    per_class: int | None
    seed: int
    rows: int | None = None
    fewer: bool = False
    test_rows: int | None = None
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the source's splits

    def __post_init__(self) -> None:
        if not isinstance(self.source, HubData | ToyData):
            raise UserError(
                f"Expected the source of few-shot rows to be a published data set, found {type(self.source).__name__}: rows "
                "of an owner would be chosen one by one."
            )
        if (self.per_class is None) == (self.rows is None):
            raise UserError(
                f"Found task.data.per_class={self.per_class} and rows={self.rows}, expected one: set the other to null."
            )
        for name, least in (("per_class", 1), ("rows", 1), ("test_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if (value is not None or name == "seed") and (type(value) is not int or value < least):
                raise UserError(f"task.data.{name}={value}, expected a whole number of at least {least}.")

    @property
    def selection(self) -> str:
        """What the privacy card says about the rows."""
        most = "at most " if self.fewer else ""
        what = f"{self.rows} rows" if self.per_class is None else f"{most}{self.per_class} rows of each class"
        said = (
            f"The training examples are {what}, selected by the public seed {self.seed}: "
            "the promise is for the selected rows, not for all from which they were selected."
        )
        return f"{said} {self.source.selection}" if self.source.selection else said

    def load(self, split: str, columns: Sequence[Column], data_root: str | None) -> pa.Table:
        """As the source's `load`; the selected rows, in the order of the source.

        Raises:
            UserError: a split is the train split under another name; there are too few training rows, or of a class; with
                `per_class` no column, or more than one, is a label.
        """
        labels = [column for column in columns if column.kind == "label"]
        if self.per_class is not None and len(labels) != 1:
            raise UserError(f"few-shot data need one label column, found {len(labels)}: choose a classification task.")
        table = self.source.load(split, columns, data_root)
        digest = content_digest(table, "")
        if split != "train":
            if digest == self._digests.get("train"):
                raise UserError(
                    f"train and {split} are the same {table.num_rows} rows: scores on training rows would be published "
                    "without noise; put other rows into the validation split."
                )
            if self.test_rows is None or self.test_rows >= table.num_rows:
                return table
            return table.take(np.sort(self._chosen(np.arange(table.num_rows), self.test_rows, split)))
        self._digests[split] = digest
        if self.rows is not None:
            if table.num_rows < self.rows:
                raise UserError(f"There are {table.num_rows} training rows, expected at least task.data.rows={self.rows}.")
            return table.take(np.sort(self._chosen(np.arange(table.num_rows), self.rows, split)))
        (label,) = labels
        found = table[label.name].to_numpy()
        chosen = [self._of_class(np.flatnonzero(found == number), number) for number in range(label.num_labels)]
        return table.take(np.sort(np.concatenate(chosen)))

    def _of_class(self, rows: np.ndarray, number: int) -> np.ndarray:
        assert self.per_class is not None
        if len(rows) < self.per_class and not (self.fewer and len(rows)):
            raise UserError(
                f"class {number} has {len(rows)} training rows, expected at least task.data.per_class={self.per_class}: "
                "lower it."
            )
        return np.random.default_rng([self.seed, number]).choice(rows, min(self.per_class, len(rows)), replace=False)

    def _chosen(self, rows: np.ndarray, count: int, split: str) -> np.ndarray:
        """By a stream of the seed and the split."""
        key = int.from_bytes(split.encode(), "little")
        return np.random.default_rng([self.seed, key]).choice(rows, count, replace=False)
