"""Where a task's rows come from: a folder of files, the Hugging Face hub, or the toy world. One class per source.

`load(split, columns, data_root)` is all that a source offers. It returns an Arrow table in which every cell has been
checked, and it writes nothing into the data folder.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from privzoo import toyworld
from privzoo.errors import UserError, first_line
from privzoo.hub import why_not_to_be_had
from privzoo.tasks.cells import RAISE, SKIP, Column
from privzoo.tasks.columns import checked_or_skipped, checked_table, require_columns
from privzoo.tasks.files import find_split, read_split
from privzoo.tasks.splits import may_meet

TOYS = {"text": "text_rows", "lm": "lm_rows", "images": "image_rows"}  # the kind, and who makes its rows


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub, or the same as files `<data_root>/<folder>/<split>.parquet|jsonl|csv`.

    Args:
        name: repository on the hub, for example "nyu-mll/glue".
        config: configuration of that repository, or None.
        folder: the data set's folder below data_root.
        splits: our name of a split ("train", "validation") to the hub's name of it, which is also the file's.
        revision: of the repository; None: its main branch. Repositories that hold a script have their files in
            "refs/convert/parquet".
        on_error: "raise" at the first row that is not what the task expects, or "skip" such rows and count them. Whether a
            row is skipped depends on that row alone.
    """

    name: str
    config: str | None
    folder: str
    splits: dict[str, str]
    revision: str | None = None
    on_error: str = RAISE
    _skipped: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)  # of each split

    def __post_init__(self) -> None:
        if self.on_error not in (RAISE, SKIP):
            raise UserError(f"Expected data.on_error={self.on_error} to be {RAISE} or {SKIP}.")
        named = list(self.splits.values())
        if any(may_meet(one, other) for i, one in enumerate(named) for other in named[:i]):
            raise UserError(
                f"the data set {self.name} has the same rows under two names ({self.splits}): scores on training rows would "
                "be published without noise; name a split of its own for validation, or slices that do not meet, such as "
                "train[:90%] and train[90%:]."
            )

    @property
    def selection(self) -> str | None:
        """What the privacy card says about the rows, once they are loaded."""
        return left_out(self._skipped)

    def load(self, split: str, columns: Sequence[Column], data_root: str | None) -> pa.Table:
        """All rows of a split, in the order of the source, with the asked columns only.

        With `data_root` only files are read; without it only the hub, or its cache where it cannot be reached. A split
        that the source lacks is an error, never a part of another split.

        Raises:
            UserError: the data cannot be had, or are not what `columns` says.
        """
        if split not in self.splits:
            raise UserError(
                f"the data set {self.name} has no {split!r} among its splits ({', '.join(self.splits)}): "
                f"add data.splits.{split} to the task's configuration."
            )
        skipped: list[int] | None = [] if self.on_error == SKIP else None
        if data_root is not None:
            path = find_split(data_root, self.folder, self.splits[split])
            table, where = read_split(path, columns, skipped), str(path)
        else:
            table, where = self._from_hub(self.splits[split]), f"{self.name} ({self.splits[split]} split)"
            require_columns(table.column_names, columns, where)
        rows = checked_or_skipped(table, columns, where, skipped)
        self._skipped[split] = len(skipped or ())
        return rows

    def _from_hub(self, split: str) -> pa.Table:
        import datasets  # takes two seconds, and most runs read files

        unreachable = why_not_to_be_had(self.name, "dataset")
        try:
            with _quiet_datasets(offline=unreachable is not None):
                rows = datasets.load_dataset(self.name, self.config, split=split, revision=self.revision)
        except Exception as error:  # a download can raise anything; it becomes the message's reason
            what = f"{self.name}, {self.config}" if self.config else self.name
            raise UserError(
                f"the data set {what} came neither from the Hugging Face hub nor from its cache "
                f"({unreachable or first_line(error)}): name a folder that has {self.folder}/{split}.parquet, .jsonl "
                f"or .csv by data_root= or PRIVZOO_DATA, give a network or a filled cache, or choose another task, "
                f"such as task=toy_text."
            ) from error
        return rows.with_format("arrow")[:]


def left_out(skipped: Mapping[str, int]) -> str | None:
    """What the privacy card says of rows that were skipped, so many by split."""
    what = " and ".join(f"{count} rows of {split}" for split, count in skipped.items() if count)
    return f"{what} were not what the task expects and were left out (data.on_error=skip)." if what else None


@contextlib.contextmanager
def _quiet_datasets(offline: bool) -> Iterator[None]:
    """No progress bars, and with `offline` the local cache alone, for the time of the block."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    was_offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class ToyData:
    """The rows that privzoo generates itself; they need neither a file nor a network.

    Args:
        kind: "text" (text, label), "lm" (prompt, target) or "images" (image, label).
    """

    kind: Literal["text", "lm", "images"]
    selection: ClassVar[None] = None

    def load(self, split: str, columns: Sequence[Column], data_root: str | None) -> pa.Table:
        """All rows of the split "train" or "validation"; `data_root` is not looked at.

        Raises:
            UserError: the kind does not exist, or lacks a column.
        """
        if self.kind not in TOYS:
            raise UserError(f"data.kind={self.kind} does not exist: expected one of {', '.join(TOYS)}.")
        table = _toy_table(self.kind, split)
        where = f"the toy {self.kind} data ({split} split)"
        require_columns(table.column_names, columns, where)
        return checked_table(table, columns, where)


@cache  # the runs of a sweep share a process, and making rows takes a second
def _toy_table(kind: str, split: str) -> pa.Table:
    rows = getattr(toyworld, TOYS[kind])(split)
    return pa.table({name: _arrow([row[name] for row in rows]) for name in rows[0]})


def _arrow(values: list) -> pa.Array:
    if isinstance(values[0], np.ndarray):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(values))
    return pa.array(values)
