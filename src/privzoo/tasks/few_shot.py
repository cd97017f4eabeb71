"""Few-shot training splits: k rows of every class, chosen by a public seed. The protocol of Zhang et al., DPZero (2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.data import HubData, ToyData


@dataclass(frozen=True)
class FewShot:
    """`per_class` rows of every class of a source's train split; its other splits whole.

    Privacy: the selected rows are the data set. A promise is for them alone: who was in the source, and was not selected,
    is not covered, because one row more or less there changes who is selected.

    Args:
        source: where the rows come from.
        per_class: k, at least 1.
        seed: of the selection; public, and no other than this one decides it.
    Raises:
        UserError: per_class is below 1.
    """

    source: HubData | ToyData
    per_class: int
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.source, HubData | ToyData):
            raise UserError(
                f"Expected the source of few-shot rows to be a published data set, found {type(self.source).__name__}: rows "
                "of an owner would be chosen one by one."
            )
        if self.per_class < 1:
            raise UserError(f"task.data.per_class={self.per_class}, expected at least 1.")

    @property
    def selection(self) -> str:
        """What the privacy card says about the rows."""
        return (
            f"The training examples are {self.per_class} rows of each class, selected by the public seed {self.seed}: "
            "the promise is for the selected rows, not for all from which they were selected."
        )

    def load(self, split: str, columns: Sequence[Column], data_root: str | None) -> pa.Table:
        """As the source's `load`; of the split "train" the selected rows, in the order of the source.

        Raises:
            UserError: no column, or more than one, is a label; a class has fewer than `per_class` rows.
        """
        table = self.source.load(split, columns, data_root)
        if split != "train":
            return table
        labels = [column for column in columns if column.kind == "label"]
        if len(labels) != 1:
            raise UserError(f"few-shot data need one label column, found {len(labels)}: choose a classification task.")
        (label,) = labels
        found = table[label.name].to_numpy()
        chosen = [self._of_class(np.flatnonzero(found == number), number) for number in range(label.num_labels)]
        return table.take(np.sort(np.concatenate(chosen)))

    def _of_class(self, rows: np.ndarray, number: int) -> np.ndarray:
        if len(rows) < self.per_class:
            raise UserError(
                f"class {number} has {len(rows)} training rows, expected at least task.data.per_class={self.per_class}: "
                "lower it."
            )
        return np.random.default_rng([self.seed, number]).choice(rows, self.per_class, replace=False)
