"""The seam between a task and everything else: what every kind of task promises, and what they share."""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from privzoo.tasks.units import OWNER, UNIT, RowsOfUnits


class Task(ABC):
    """What is learned from which rows, and how it is scored.

    Used in this order: `load`, then `fingerprint` and `num_examples`, then `prepare`, then the rest. The row is the
    unit of privacy unless `rows_of_unit` says otherwise.

    Attributes:
        name: as in the run record.
        kind: the kind of model, see `privzoo.models.loading.load`.
        texts: how many texts a row has: 2 in a task of pairs.
        num_labels: number of classes, None where there are none.
        label_names: the classes in words, None where they have none; the saved model's configuration holds them.
        problem_type: what transformers calls it, for the saved model's configuration; None: what it takes by default.
        metrics: the names that `evaluate` returns, the headline first.
        higher_is_better: of the headline metric.
        num_examples: N, the number of units of privacy in the train split; known after `load`.
        unit: what such a unit is called, in the privacy card.
        rows_of_unit: of each unit, the numbers of its rows in `train`; None: every row is one. Known after `prepare`.
        selection: one sentence for the privacy card where the examples are a part of their source, or its rows are no
            examples; else None.
        note: one sentence for the record, such as which metrics cannot be had here; else None.
        train, validation: the encoded rows (`len`, `[i]` gives a dict); known after `prepare`.
    """

    name: str
    kind: str
    texts: int = 1
    num_labels: int | None
    metrics: tuple[str, ...]
    higher_is_better: bool
    num_examples: int
    selection: str | None = None
    note: str | None = None
    problem_type: str | None = None
    unit: str = "example"
    rows_of_unit: Sequence[Sequence[int]] | None = None
    label_names: Sequence[str] | None = None
    train: Sequence[dict]
    validation: Sequence[dict]

    def count(self, train: pa.Table) -> None:
        """Sets N, and which rows are of one unit, by the train split; for `load`."""
        if UNIT in train.column_names:
            self.unit, self.rows_of_unit = OWNER, RowsOfUnits(train[UNIT].to_numpy())
        self.num_examples = train.num_rows if self.rows_of_unit is None else len(self.rows_of_unit)

    @abstractmethod
    def load(self, data_root: str | None) -> None:
        """Reads and checks the train and validation splits; no model is needed. Sets `num_examples`.

        Raises:
            UserError: the data cannot be had, or a row is not what the task expects.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the train split's content and order and of the settings that shape its encoding."""

    @abstractmethod
    def prepare(self, processor) -> None:
        """Encodes the rows for a model's tokenizer or image processor. Sets `train` and `validation`."""

    @abstractmethod
    def length(self, row: dict) -> int:
        """The size of an encoded row; rows of like size share a micro-batch, so that little is padded."""

    def by_length(self, rows: Sequence[dict]) -> list[int]:
        """Indices of `rows`, neighbours of like length. Decodes every row; a task whose rows are all alike need not."""
        return sorted(range(len(rows)), key=lambda i: self.length(rows[i]))

    @abstractmethod
    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """One micro-batch: every value has leading dimension R = len(rows) >= 1, in the order of `rows`."""

    @abstractmethod
    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """One loss per row, shape (R,), at least float32.

        Row r depends on row r of the batch alone: not on the other rows, on R, nor (but for rounding) on the length
        to which they are padded. Never call a model with `labels=`: its mean over the batch couples the rows.
        """

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The metrics over all rows of all micro-batches, whatever their sizes.

        Runs in evaluation mode without gradients and leaves the model in the mode in which it was.

        Args:
            loader: yields collated micro-batches on the model's device, at least one.
        """

    def in_template(self, prompt: str) -> str:
        """What a language model is given of a user's text, where the task has a template for it."""
        return prompt


class EncodedRows(Sequence[dict]):
    """Token ids of many rows in a few flat arrays: a row costs its tokens and no Python object.

    Args:
        tokens: name to flat int32 array of all rows' values; the names share their boundaries.
        offsets: shape (N + 1,), where each row starts in the flat arrays.
        scalars: name to array of shape (N,).
    """

    def __init__(self, tokens: Mapping[str, np.ndarray], offsets: np.ndarray, scalars: Mapping[str, np.ndarray]):
        self._tokens, self._offsets, self._scalars = dict(tokens), offsets, dict(scalars)

    @classmethod
    def from_batches(
        cls, batches: Iterable[Mapping[str, list[list[int]]]], scalars: Mapping[str, Sequence[int] | np.ndarray]
    ) -> "EncodedRows":
        """Gathers what a tokenizer gives for one batch of rows after another."""
        pieces: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = [0]
        for batch in batches:
            for name, rows in batch.items():
                pieces.setdefault(name, []).append(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32))
            lengths.extend(len(ids) for ids in batch["input_ids"])
        offsets = np.cumsum(lengths)
        tokens = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
        assert all(len(flat) == offsets[-1] for flat in tokens.values()), "token columns differ in length"
        return cls(tokens, offsets, {name: np.asarray(values) for name, values in scalars.items()})

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        """Row `index`: views of its tokens (int32 arrays, read only by convention) and its scalars as int."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self._offsets[index], self._offsets[index + 1]
        row: dict = {name: flat[start:stop] for name, flat in self._tokens.items()}
        return row | {name: int(values[index]) for name, values in self._scalars.items()}


def pad_right(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """int64 of shape (R, longest row), filled up with `value` on the right; at least one column wide."""
    padded = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def padding_mask(rows: Sequence[np.ndarray]) -> Tensor:
    """int64 of the shape of `pad_right`: 1 on a row's own tokens, 0 on padding."""
    return pad_right([np.ones(len(row), dtype=np.int64) for row in rows], 0)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is raised to float32; float64 stays, so that exactness can be tested in it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's former mode comes back, even after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
