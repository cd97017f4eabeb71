"""One split of a data set as a file: Parquet, JSON lines or CSV, read without guessing and without writing a cache."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from privzoo.errors import UserError, first_line
from privzoo.tasks.cells import Column, bad_flag, bad_key, bad_label, bad_text, bad_texts
from privzoo.tasks.columns import TEXTS_OF_STRUCT, first_true, require_columns

SUFFIXES = (".parquet", ".jsonl", ".csv")
SPANS = pa.struct({"text": pa.large_list(pa.large_string()), "answer_start": pa.large_list(pa.int64())})
OWN_SUFFIXES = (*SUFFIXES, ".json")
# In place of bytes that are not UTF-8, while a CSV is read from which rows are skipped: a noncharacter, which no text needs.
MARK, MARKED = "\ufdd0", "privzoo_marked"
codecs.register_error(MARKED, lambda error: (MARK, error.end))  # type: ignore[attr-defined]


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


def read_split(path: Path, columns: Sequence[Column], skipped: list[int] | None = None) -> pa.Table:
    """The asked columns of a split file, as they are stored; nothing else is read, and nothing is written.

    CSV cells stay text character by character (`007` and `nan` are text), an unquoted empty cell is null and `""`
    is an empty text; only label columns are turned into integers.

    Args:
        skipped: rows of JSON and CSV that cannot be had are left out and their numbers added here; None: the first is an
            error.
    Raises:
        UserError: the file is empty or cannot be read as what its name says, or a column is missing.
    """
    reader = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[path.suffix]
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes), expected rows: fill it, or choose another data set.")
        return reader(path, columns, skipped)
    except (pa.ArrowException, OSError, csv.Error) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): fetch or write the file anew.") from error


def _read_parquet(path: Path, columns: Sequence[Column], skipped: list[int] | None) -> pa.Table:
    # Not read_table: that takes folders named a=b above the file for columns.
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        require_columns(file.schema_arrow.names, columns, str(path))
        return file.read(columns=[column.name for column in columns])


def _read_jsonl(path: Path, columns: Sequence[Column], skipped: list[int] | None) -> pa.Table:
    """Python's json, not Arrow's: Arrow takes text that looks like a date for a date."""
    with path.open("rb") as file:
        lines = (partial(_parse_line, path, number, line) for number, line in enumerate(file, start=1) if line.strip())
        return _of_records(lines, columns, str(path), skipped)


def _read_json(path: Path, columns: Sequence[Column], skipped: list[int] | None) -> pa.Table:
    """One list of objects."""
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8, expected text: store the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise UserError(f"{path} is not JSON ({error}): write a list of objects, or one object a line as .jsonl.") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__}, expected a list of objects: write it so.")
    objects = (partial(_object, path, row, record) for row, record in enumerate(records))
    return _of_records(objects, columns, str(path), skipped)


def _object(path: Path, row: int, record: object) -> dict:
    if not isinstance(record, dict):
        raise UserError(f"{path}, row {row} is a {type(record).__name__}, expected an object.")
    return record


def _of_records(
    records: Iterable[Callable[[], dict]], columns: Sequence[Column], where: str, skipped: list[int] | None
) -> pa.Table:
    cells: dict[str, list] = {column.name: [] for column in columns}
    for row, record_of in enumerate(records):
        try:
            record = record_of()
            if skipped is None and row == 0:
                require_columns(list(record), columns, where)
            found = [_cell_of(record, column, where, row) for column in columns]
        except UserError:
            if skipped is None:
                raise
            skipped.append(row)
            continue
        for column, cell in zip(columns, found, strict=True):
            cells[column.name].append(cell)
    types = {
        "text": pa.large_string(),
        "texts": pa.large_list(pa.large_string()),
        "label": pa.int64(),
        "key": pa.large_string(),
        "spans": SPANS,
        "image": pa.large_binary(),  # of no row: `_checked_cell` refuses the first
        "flag": pa.int64(),
    }
    return pa.table({column.name: pa.array(cells[column.name], types[column.kind]) for column in columns})


def _parse_line(path: Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number) from error
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise UserError(f"{path}, line {number} is not JSON ({error}): write one object per line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} is a {type(record).__name__}, expected a JSON object per line.")
    return record


def _cell_of(record: dict, column: Column, where: str, row: int) -> object:
    if column.name not in record:
        raise UserError(f"{where}, row {row} has no {column.name!r}: add it or leave the row out.")
    return _checked_cell(record[column.name], column, where, row)


def _checked_cell(value: object, column: Column, where: str, row: int) -> object:
    if column.kind == "image":
        raise UserError(f"{where}: JSON lines cannot hold images such as {column.name!r}: store them as Parquet.")
    if column.kind == "label":
        number = column.number_of(value)
        if type(number) is not int or not column.takes(number):
            raise bad_label(where, row, value, column)
        return number
    elif column.kind == "flag":
        if type(value) not in (bool, int) or value not in (0, 1):
            raise bad_flag(where, row, value, column)
        return int(value)
    elif column.kind == "key":
        if (not isinstance(value, str) or not value) and type(value) is not int:
            raise bad_key(where, row, value, column)
        return _checked_cell(str(value), replace(column, kind="text"), where, row)
    elif column.kind == "spans":
        texts = _checked_cell(value, replace(column, kind="texts"), where, row)
        starts = value.get("answer_start") if isinstance(value, dict) else None
        if not isinstance(starts, list) or any(type(start) is not int or abs(start) >= 2**63 for start in starts):
            raise bad_texts(where, row, value, column)
        return {"text": texts, "answer_start": starts}
    elif column.kind == "texts":
        texts = next((value[f] for f in TEXTS_OF_STRUCT if f in value), None) if isinstance(value, dict) else value
        if not isinstance(texts, list):
            raise bad_texts(where, row, value, column)
        return [_checked_cell(text, replace(column, kind="text"), where, row) for text in texts]
    elif not isinstance(value, str) or (not value.isascii() and _has_lone_surrogate(value)):
        raise bad_text(where, row, value, column)
    return value


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _skip(skipped: list[int], row: pyarrow.csv.InvalidRow) -> str:
    skipped.append(-1 if row.number is None else row.number)
    return "skip"


def _read_csv(path: Path, columns: Sequence[Column], skipped: list[int] | None) -> pa.Table:
    names = [column.name for column in columns]
    try:
        with path.open(encoding="utf-8-sig", newline="", errors="strict" if skipped is None else "replace") as file:
            header = next(csv.reader(file), [])
        require_columns(header, columns, str(path))
        if path.read_bytes().count(b'"') % 2:  # all that follows would be one cell
            raise UserError(f"{path} holds a quote that is not closed: write a quote within a quoted cell twice.")
        table = pyarrow.csv.read_csv(
            path if skipped is None else pa.BufferReader(path.read_bytes().decode(errors=MARKED).encode()),
            # One block: a cell may be longer than Arrow's default block.
            read_options=pyarrow.csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), (1 << 31) - 1)),
            parse_options=pyarrow.csv.ParseOptions(
                newlines_in_values=True, invalid_row_handler=None if skipped is None else partial(_skip, skipped)
            ),
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
        _refuse_uneven(path)
        raise
    for index, column in enumerate(columns if skipped is not None else ()):
        marked = pc.fill_null(pc.match_substring(table[column.name], MARK), False)
        nothing = pa.scalar(None, pa.large_string())
        table = table.set_column(index, column.name, pc.if_else(marked, nothing, table[column.name]))
    for index, column in enumerate(columns):
        if column.kind in ("image", "texts", "spans"):
            what = "images" if column.kind == "image" else "lists of texts"
            ways = "Parquet" if column.kind == "image" else "Parquet or JSON lines"
            raise UserError(f"{path}: CSV cannot hold {what} such as {column.name!r}: store them as {ways}.")
        if column.kind == "label":
            labels = _labels_of_csv(table[column.name], column)
            row = first_true(pc.is_null(labels))
            if row >= 0 and skipped is None:
                raise bad_label(str(path), row, table[column.name][row].as_py(), column)
            table = table.set_column(index, column.name, labels)
    return table


def _refuse_uneven(path: Path) -> None:
    """Raises UserError for the first row that has not as many cells as the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise UserError(
                f"{path}, row {number} has {len(row)} cells, expected {len(header)} as the header: correct it (a text with "
                "a comma in it wants quotes)."
            )


def _labels_of_csv(cells: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    """The number of each cell that is one, or a declared name; null for others."""
    is_number = pc.fill_null(pc.match_substring_regex(cells, r"^-?[0-9]{1,18}$"), False)
    numbers = pc.if_else(is_number, cells, pa.scalar(None, pa.large_string())).cast(pa.int64())
    return pc.coalesce(pc.index_in(cells, pa.array(column.names, pa.large_string())).cast(pa.int64()), numbers)


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(f"{path}, line {line} is not UTF-8, expected text: store the file as UTF-8.")
