"""One split of a data set as a file: Parquet, JSON lines or CSV, read without guessing and without writing a cache."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from privzoo.errors import UserError, first_line
from privzoo.tasks.columns import Column, bad_label, bad_text, bad_texts, first_true, require_columns

SUFFIXES = (".parquet", ".jsonl", ".csv")


def find_split(data_root: str, folder: str, split: str) -> Path:
    """The one file `<data_root>/<folder>/<split>.parquet|jsonl|csv`.

    Raises:
        UserError: the folder is missing, or no file or more than one file holds the split.
    """
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise UserError(f"data_root={data_root} is not a folder: name one that has a folder {folder!r} in it.")
    place = root / folder
    if not place.is_dir():
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise UserError(
            f"data_root={data_root} has no folder {folder!r} (found {_some(found)}): put the data set there, "
            f"name another data_root, or unset it to ask the Hugging Face hub."
        )
    paths = [place / (split + suffix) for suffix in SUFFIXES]
    present = [path for path in paths if path.is_file()]
    if not present:
        found = sorted(path.name for path in place.iterdir())
        raise UserError(
            f"{place} has no split {split!r} (found {_some(found)}): add {split}.parquet, {split}.jsonl or {split}.csv."
        )
    if len(present) > 1:
        names = " and ".join(path.name for path in present)
        raise UserError(f"{place} has {names}, expected one file for the split: remove the others.")
    return present[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def read_split(path: Path, columns: Sequence[Column]) -> pa.Table:
    """The asked columns of a split file, as they are stored; nothing else is read, and nothing is written.

    CSV cells stay text character by character (`007` and `nan` are text), an unquoted empty cell is null and `""`
    is an empty text; only label columns are turned into integers.

    Raises:
        UserError: the file is empty or cannot be read as what its name says, or a column is missing.
    """
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}[path.suffix]
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes), expected rows: fill it, or choose another data set.")
        return reader(path, columns)
    except (pa.ArrowException, OSError, csv.Error) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): fetch or write the file anew.") from error


def _read_parquet(path: Path, columns: Sequence[Column]) -> pa.Table:
    # Not read_table: that takes folders named a=b above the file for columns.
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        require_columns(file.schema_arrow.names, columns, str(path))
        return file.read(columns=[column.name for column in columns])


def _read_jsonl(path: Path, columns: Sequence[Column]) -> pa.Table:
    """Python's json, not Arrow's: Arrow takes text that looks like a date for a date."""
    cells: dict[str, list] = {column.name: [] for column in columns}
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = _parse_line(path, number, line)
            if row == 0:
                require_columns(list(record), columns, str(path))
            for column in columns:
                if column.name not in record:
                    raise UserError(f"{path}, row {row} has no {column.name!r}: add it or leave the row out.")
                cells[column.name].append(_checked_cell(record[column.name], column, str(path), row))
            row += 1
    types = {"text": pa.large_string(), "texts": pa.large_list(pa.large_string()), "label": pa.int64()}
    return pa.table({column.name: pa.array(cells[column.name], types[column.kind]) for column in columns})


def _parse_line(path: Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is not JSON ({error}): write one object per line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} is a {type(record).__name__}, expected a JSON object per line.")
    return record


def _checked_cell(value: object, column: Column, where: str, row: int) -> object:
    if column.kind == "image":
        raise UserError(f"{where}: JSON lines cannot hold images such as {column.name!r}: store them as Parquet.")
    if column.kind == "label":
        if type(value) is not int or not column.takes(value):
            raise bad_label(where, row, value, column)
    elif column.kind == "texts":
        texts = value.get("text") if isinstance(value, dict) else value
        if not isinstance(texts, list):
            raise bad_texts(where, row, value, column)
        return [_checked_cell(text, replace(column, kind="text"), where, row) for text in texts]
    elif not isinstance(value, str) or (not value.isascii() and _has_lone_surrogate(value)):
        raise bad_text(where, row, value, column)
    return value


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_csv(path: Path, columns: Sequence[Column]) -> pa.Table:
    names = [column.name for column in columns]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        require_columns(header, columns, str(path))
        table = pyarrow.csv.read_csv(
            path,
            # One block: a cell may be longer than Arrow's default block.
            read_options=pyarrow.csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), (1 << 31) - 1)),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.large_string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise _not_utf8(path, number) from error
        raise
    for index, column in enumerate(columns):
        if column.kind in ("image", "texts"):
            what = "images" if column.kind == "image" else "lists of texts"
            ways = "Parquet" if column.kind == "image" else "Parquet or JSON lines"
            raise UserError(f"{path}: CSV cannot hold {what} such as {column.name!r}: store them as {ways}.")
        if column.kind == "label":
            table = table.set_column(index, column.name, _labels_of_csv(table[column.name], column, str(path)))
    return table


def _labels_of_csv(cells: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    row = first_true(pc.invert(pc.fill_null(pc.match_substring_regex(cells, r"^-?[0-9]{1,18}$"), False)))
    if row >= 0:
        raise bad_label(where, row, cells[row].as_py(), column)
    return cells.cast(pa.int64())


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(f"{path}, line {line} is not UTF-8, expected text: store the file as UTF-8.")
