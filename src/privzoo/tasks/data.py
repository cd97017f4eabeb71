"""Where a task's rows come from: a folder of files, the Hugging Face hub, or the toy world. One class per source.

`load(split, columns, data_root)` is all that a source offers. It returns an Arrow table in which every cell has been
checked, and it writes nothing into the data folder.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa

from privzoo import toyworld
from privzoo.errors import UserError
from privzoo.tasks.columns import Column, checked_table, require_columns
from privzoo.tasks.files import find_split, read_split

HUB_TIMEOUT_S = 8.0
TOYS = {"text": "text_rows", "lm": "lm_rows", "images": "image_rows"}  # the kind, and who makes its rows


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub, or the same as files `<data_root>/<folder>/<split>.parquet|jsonl|csv`.

    Args:
        name: repository on the hub, for example "nyu-mll/glue".
        config: configuration of that repository, or None.
        folder: the data set's folder below data_root.
        splits: our name of a split ("train", "validation") to the hub's name of it, which is also the file's.
    """

    name: str
    config: str | None
    folder: str
    splits: dict[str, str]

    def __post_init__(self) -> None:
        if len(set(self.splits.values())) < len(self.splits):
            raise UserError(
                f"the data set {self.name} has one split under two names ({self.splits}): scores on the training split "
                "would be published without noise; name a split of its own for validation."
            )

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
        if data_root is not None:
            path = find_split(data_root, self.folder, self.splits[split])
            return checked_table(read_split(path, columns), columns, str(path))
        table = self._from_hub(self.splits[split])
        where = f"{self.name} ({self.splits[split]} split)"
        require_columns(table.column_names, columns, where)
        return checked_table(table, columns, where)

    def _from_hub(self, split: str) -> pa.Table:
        import datasets  # takes two seconds, and most runs read files

        unreachable = _why_unreachable(self.name)
        try:
            with _quiet_datasets(offline=unreachable is not None):
                rows = datasets.load_dataset(self.name, self.config, split=split)
        except Exception as error:  # a download can raise anything; it becomes the message's reason
            what = f"{self.name}, {self.config}" if self.config else self.name
            raise UserError(
                f"the data set {what} came neither from the Hugging Face hub nor from its cache "
                f"({unreachable or _first_line(error)}): name a folder that has {self.folder}/{split}.parquet, .jsonl "
                f"or .csv by data_root= or PRIVZOO_DATA, give a network or a filled cache, or choose another task, "
                f"such as task=toy_text."
            ) from error
        return rows.with_format("arrow")[:]


def _why_unreachable(name: str) -> str | None:
    """None if the hub answers for the data set, else the reason, after at most HUB_TIMEOUT_S seconds.

    load_dataset itself tries six times over half a minute. The question is put from a thread, because the look-up of a
    host name knows no time limit.
    """
    import huggingface_hub

    reason = [f"no answer within {HUB_TIMEOUT_S:.0f} s"]

    def ask() -> None:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
            reason.clear()
        except Exception as error:  # whatever it is, it becomes the message's reason
            reason[:] = [_first_line(error)]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return reason[0] if reason else None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")


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
