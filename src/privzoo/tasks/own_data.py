"""A user's own file, split by its content: `task=jsonl data.path=train.jsonl` (JSON, CSV and Parquet as well).

Neither N nor who trains may hang on other people's rows more than by adding and removing. So a row goes to validation by a
keyed hash of its own content (of its owner, where there is one): one row's leaving moves no other. Equal rows go the same
way, so that none is trained on and scored.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from privzoo.errors import UserError
from privzoo.tasks.cells import RAISE, SKIP, Column, shown
from privzoo.tasks.columns import checked_or_skipped
from privzoo.tasks.data import left_out
from privzoo.tasks.files import OWN_SUFFIXES, read_split
from privzoo.tasks.units import UNIT


class OwnData:
    """The rows of one file, or of one for training and one for validation.

    Guarantee: whether a row trains, and whether it is left out, depends on that row alone (of an owner with more rows than
    `rows_per_owner`, on that owner's rows alone). With an owner, all rows of one owner are one unit of privacy, and of the
    same split.

    Args:
        path: of a .jsonl, .json (a list of objects), .csv or .parquet file.
        validation_path: another file for validation; None: rows of `path` are set aside for it.
        validation_share: expected share of rows (of owners) that are set aside, in (0, 1).
        split_seed: key of the hash that sets them aside and chooses an owner's rows; public.
        columns: the column of the file for each name that the task asks for; others are called what the task calls them.
        owner: the column that says whose a row is (text or a whole number); None: every row is somebody else's.
        rows_per_owner: at most so many training rows of one owner, chosen by hash; None: all.
        id: a column in which no value may come twice; None: there is none.
        on_error: "raise" at the first row that is not what the task expects, or "skip" such rows and count them.
    Raises:
        UserError: an argument is not of this form.
    """

    def __init__(
        self,
        path: str | None,
        validation_path: str | None = None,
        validation_share: float = 0.1,
        split_seed: int = 0,
        columns: Mapping[str, str] | None = None,
        owner: str | None = None,
        rows_per_owner: int | None = None,
        id: str | None = None,
        on_error: str = RAISE,
    ) -> None:
        if path is None:
            raise UserError("Expected data.path=<file> on the command line or in a yaml: the task reads a file of your own.")
        if not isinstance(validation_share, (int, float)) or not 0 < validation_share < 1:
            raise UserError(f"Expected task.data.validation_share={validation_share} to be a number between 0 and 1.")
        names = [*(columns or {}).items(), ("owner", owner), ("id", id)] if isinstance(columns or {}, Mapping) else [("", 0)]
        if not all(isinstance(value, str) or (value is None and key in ("owner", "id")) for key, value in names):
            raise UserError(
                f"Expected task.data.columns={columns}, owner={owner} and id={id} to name columns, as in "
                "task.data.columns={prompt: question}."
            )
        if rows_per_owner is not None and (owner is None or type(rows_per_owner) is not int or rows_per_owner < 1):
            raise UserError(
                f"Expected task.data.rows_per_owner={rows_per_owner} to be a whole number of at least 1, beside "
                f"task.data.owner=<column>, found owner={owner}."
            )
        if on_error not in (RAISE, SKIP):
            raise UserError(f"Expected data.on_error={on_error} to be {RAISE} or {SKIP}.")
        self._paths = {"train": path, "validation": validation_path or path}
        self._share, self._key = (0.0 if validation_path else validation_share), f"privzoo split {split_seed}".encode()
        self._names, self._owner, self._cap, self._id = dict(columns or {}), owner, rows_per_owner, id
        self._on_error = on_error
        self._skipped: dict[str, int] = {}
        self._ids: dict[str, Path] = {}  # that came already, and in which file
        self._trained: set[tuple] = set()  # whose rows train, or which, while validation is in another file

    @property
    def selection(self) -> str | None:
        """What the privacy card says about the rows, once they are loaded."""
        said = []
        if self._owner is not None:
            cap = "all rows" if self._cap is None else f"at most {self._cap} rows, chosen by a public hash,"
            said.append(
                f"A unit of privacy is an owner, by the column {self._owner!r}: {cap} of one owner are one contribution."
            )
        files = {"the file": self._skipped.get("train", 0)}
        if not self._share:
            files["the validation file"] = self._skipped.get("validation", 0)
        said.append(left_out(files) or "")
        return " ".join(filter(None, said)) or None

    def load(self, split: str, columns: Sequence[Column], data_root: str | None) -> pa.Table:
        """The rows of "train" or "validation" in the order of the file, with the names that the task gives its columns; of
        training rows that have owners, their numbers in the column `UNIT`. `data_root` is not looked at.

        Raises:
            UserError: the file cannot be read, or a row is not what `columns` says; an id comes twice, an owner is in both
                files; no row is left.
        """
        path = Path(self._paths[split]).expanduser()
        unknown = [name for name in self._names if name not in [column.name for column in columns]]
        if unknown:
            raise UserError(
                f"task.data.columns names {unknown[0]!r}, which the task does not read: it reads "
                f"{', '.join(column.name for column in columns)}."
            )
        theirs = [replace(column, name=self._names.get(column.name, column.name)) for column in columns]
        rows = self._sound_rows(path, theirs, split)
        table = pa.table([rows[column.name] for column in theirs], [column.name for column in columns])
        contents = _contents(table)
        owners = None if self._owner is None else rows[self._owner].to_pylist()
        whose = [(owner,) for owner in owners] if owners else contents
        kept = self._of_split(whose, split)
        self._refuse_both({whose[row] for row in kept}, path, split)
        if owners is not None and split == "train":
            kept = self._capped(kept, owners, contents)
            numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners[row] for row in kept))}
            table = table.append_column(UNIT, pa.array([numbers.get(owner, -1) for owner in owners], pa.int64()))
        return _filled(table.take(kept), table.num_rows, path, split)

    def _sound_rows(self, path: Path, columns: Sequence[Column], split: str) -> pa.Table:
        """The rows with all columns that are asked for, checked; with "skip" without those that are wrong."""
        if path.suffix not in OWN_SUFFIXES:
            raise UserError(
                f"{path} is none of {', '.join(OWN_SUFFIXES)}: convert it, or give it the name that tells what it is."
            )
        if not path.is_file():
            raise UserError(f"Expected data.path={path} to be a file: it does not exist.")
        keys = [Column(name, "key") for name in (self._owner, self._id) if name is not None]
        wanted = list({column.name: column for column in [*columns, *keys]}.values())
        skipped: list[int] | None = [] if self._on_error == SKIP else None
        rows = read_split(path, wanted, skipped)
        rows = checked_or_skipped(rows, wanted, str(path), skipped)
        self._skipped[split] = len(skipped or ())
        if self._id is not None:
            self._refuse_twice(rows[self._id].to_pylist(), path)
        return rows

    def _refuse_twice(self, ids: Sequence[str], path: Path) -> None:
        """No value comes twice, in this file or in that of the training rows."""
        counts = Counter(ids)
        for each, count in counts.items():
            before = self._ids.get(each, path)
            if count > 1 or before != path:
                rows = [number for number, other in enumerate(ids) if other == each][:5]
                where = f"of {count} rows (sound rows {rows})" if count > 1 else f"of a row of {before}, too"
                raise UserError(
                    f"{path}: {self._id!r} {shown(each)} is that {where}, expected no value twice: leave the others out, or "
                    "set task.data.id=null."
                )
        self._ids |= dict.fromkeys(counts, path)

    def _of_split(self, whose: Sequence[tuple], split: str) -> np.ndarray:
        """Numbers of the rows of a split, by the hash of each row's own content or owner."""
        if not self._share:
            return np.arange(len(whose))
        aside = np.fromiter((_fraction(self._key, each) < self._share for each in whose), bool, len(whose))
        return np.flatnonzero(aside if split == "validation" else ~aside)

    def _refuse_both(self, whose: set[tuple], path: Path, split: str) -> None:
        """Of two files: nobody's rows may be trained on and scored; without owners, no row."""
        if self._share:
            return  # a hash has set them apart
        if split == "train":
            self._trained = whose
        elif whose & self._trained:
            found = f"{len(whose & self._trained)} {'rows are' if self._owner is None else 'owners have rows'} here and in"
            raise UserError(
                f"{path}: {found} {self._paths['train']}: what is scored would be published without noise; put each "
                "into one file."
            )

    def _capped(self, kept: np.ndarray, owners: Sequence[str], contents: Sequence[tuple]) -> np.ndarray:
        """At most `rows_per_owner` rows of each owner: those of the smallest hash, which no other owner's rows change."""
        if self._cap is None or not len(kept):
            return kept
        by_owner: dict[str, list[int]] = {}
        for row in kept.tolist():
            by_owner.setdefault(owners[row], []).append(row)
        chosen = [
            sorted(rows, key=lambda row: _fraction(self._key, (owners[row], *contents[row])))[: self._cap]
            for rows in by_owner.values()
        ]
        return np.sort(np.concatenate(chosen))


def _filled(table: pa.Table, rows: int, path: Path, split: str) -> pa.Table:
    if table.num_rows:
        return table
    raise UserError(
        f"{path}: none of {rows} rows is for {split}: add rows, change task.data.validation_share, or give "
        "data.validation_path=<file>."
    )


def _contents(table: pa.Table) -> list[tuple]:
    """The cells of each row that the task reads, as text."""
    return list(zip(*(map(repr, column.to_pylist()) for column in table.columns), strict=True))


def _fraction(key: bytes, parts: Sequence[str]) -> float:
    """A number in [0, 1) that hangs on the key and these parts alone."""
    digest = hashlib.blake2b(key=key[:64], digest_size=8)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return int.from_bytes(digest.digest(), "big") / 2.0**64
