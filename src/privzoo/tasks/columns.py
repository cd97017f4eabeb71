"""The checks that every table passes before it is used."""

import difflib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from privzoo.errors import UserError
from privzoo.tasks.cells import Column, bad_flag, bad_key, bad_label, bad_text, blank_text, not_a_choice, shown

SAME_CHECK = {"spans": "texts"}  # and one more
TEXTS_OF_STRUCT = ("text", "spans")  # what SQuAD and DROP call the texts of an answer


def require_columns(found: Sequence[str], columns: Sequence[Column], where: str) -> None:
    """Raises UserError unless every column is among `found` exactly once."""
    for column in columns:
        if column.name not in found:
            close = difflib.get_close_matches(column.name, found, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(
                f"{where} has no column {column.name!r}{hint}: found {', '.join(found) or 'none'}; "
                f"rename a column, or name yours in the task's configuration."
            )
        if list(found).count(column.name) > 1:
            raise UserError(f"{where} has several columns named {column.name!r}, expected one: rename the others.")


def checked_table(table: pa.Table, columns: Sequence[Column], where: str) -> pa.Table:
    """The asked columns of `table`, each proved to hold what its kind says, in one layout per kind.

    Text comes back as large_string, texts (at least one a row; the structs of SQuAD and DROP will do) as a
    large_list of them, spans (such a struct) as texts beside a large_list of int64 named `starts_of(name)`, a label as int64
    in 0..num_labels-1, a flag as int64 that is 0 or 1, a key as large_string, an image as large_binary (the bytes of a
    picture file) or as a fixed-shape uint8 tensor. Nothing is null and nothing is coerced. Rows without a label
    (`Column.unlabelled`) are left out.

    Args:
        table: has every one of `columns` (see `require_columns`).
        where: what the messages call the table, for example its path.
    Raises:
        UserError: for the first thing that is wrong, with its row.
    """
    return _labelled(_checked(table, columns, where), columns, where)


def _checked(table: pa.Table, columns: Sequence[Column], where: str) -> pa.Table:
    """`checked_table` with the rows that have no label."""
    if table.num_rows == 0:
        raise UserError(f"{where} has 0 rows, expected at least 1: fill it, or choose another data set.")
    check = {
        "text": _checked_text, "texts": _checked_texts, "label": _checked_label, "image": _checked_image,
        "key": _checked_key, "flag": _checked_flag,
    }  # fmt: skip
    checked = pa.table(
        {
            column.name: check[SAME_CHECK.get(column.kind, column.kind)](table[column.name], column, where)
            for column in columns
        }
    )
    for column in (column for column in columns if column.kind == "spans"):
        places = _checked_places(table[column.name], checked[column.name], column, where)
        checked = checked.append_column(starts_of(column.name), places)
        _check_within(checked, column, where)
    return checked


def _labelled(table: pa.Table, columns: Sequence[Column], where: str) -> pa.Table:
    """The rows of a checked table that have their labels."""
    for column in (column for column in columns if column.unlabelled is not None):
        table = table.filter(pc.not_equal(table[column.name], column.unlabelled))
        if table.num_rows == 0:
            raise UserError(f"{where}: {column.name!r} is {column.unlabelled}, no label, in all rows: choose another split.")
    return table


def sound_rows(table: pa.Table, columns: Sequence[Column], where: str, skipped: list[int], first: int = 0) -> list[pa.Table]:
    """The rows that are what their columns say, checked, in order, in pieces; the numbers of the others are added to
    `skipped`. Whether a row is left out depends on that row alone.

    Args:
        first: number of the table's first row.
    """
    try:
        return [_checked(table, columns, where)] if table.num_rows else []
    except UserError:
        if table.num_rows == 1:
            skipped.append(first)
            return []
    half = table.num_rows // 2
    parts = ((table.slice(0, half), first), (table.slice(half), first + half))
    return [piece for part, start in parts for piece in sound_rows(part, columns, where, skipped, start)]


def checked_or_skipped(table: pa.Table, columns: Sequence[Column], where: str, skipped: list[int] | None) -> pa.Table:
    """`checked_table`; with a list for `skipped`, of the rows that are what their columns say, the others' numbers in it.

    Raises:
        UserError: as `checked_table`; no row is left.
    """
    if skipped is None:
        return checked_table(table, columns, where)
    pieces = sound_rows(table, columns, where, skipped)
    if not pieces:
        raise UserError(f"{where}: none of {len(skipped)} rows is what the task expects; data.on_error=raise says why.")
    return _labelled(pa.concat_tables(pieces), columns, where)


def first_true(mask: pa.ChunkedArray) -> int:
    """The row of the first True of a boolean column, or -1. Null counts as False."""
    return pc.index(mask, pa.scalar(True)).as_py()


def _checked_text(
    array: pa.ChunkedArray, column: Column, where: str, row_of: Callable[[int], int] = lambda place: place
) -> pa.ChunkedArray:
    if array.null_count:
        raise bad_text(where, row_of(first_true(pc.is_null(array))), None, column)
    value_type = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        row = max(first_true(pc.is_nan(array)), 0) if pa.types.is_floating(value_type) else 0
        raise UserError(
            f"{where}: column {column.name!r} holds {array.type} (row {row_of(row)}: {shown(array[row].as_py())}), "
            f"expected text: store the column as strings."
        )
    text = array.cast(pa.large_string())
    try:
        text.validate(full=True)  # a Parquet file may hold any bytes under the name of a string
    except pa.ArrowInvalid as error:
        row = next(row for row, cell in enumerate(text.cast(pa.large_binary())) if not _is_utf8(cell.as_py()))
        raise UserError(
            f"{where}, row {row_of(row)}: {column.name!r} is not UTF-8, expected text: store the file as UTF-8."
        ) from error
    if column.names:
        row = first_true(pc.invert(pc.is_in(text, pa.array(column.names, pa.large_string()))))
        if row >= 0:
            raise not_a_choice(where, row_of(row), text[row].as_py(), column)
    if not column.empty:
        row = first_true(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0))
        if row >= 0:
            raise blank_text(where, row_of(row), column)
    return text


def _checked_key(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    if pa.types.is_integer(array.type):
        array = array.cast(pa.large_string())
    elif not _is_text(array.type):
        raise bad_key(where, 0, array[0].as_py(), column)
    row = first_true(pc.equal(pc.fill_null(pc.utf8_length(array.cast(pa.large_string())), 0), 0))
    if row >= 0:
        raise bad_key(where, row, array[row].as_py(), column)
    return _checked_text(array, column, where)


def _checked_texts(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    for field in TEXTS_OF_STRUCT:
        if pa.types.is_struct(array.type) and array.type.get_field_index(field) >= 0:
            array = pc.struct_field(array, field)
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if not is_list or pa.types.is_nested(array.type.value_type):
        raise UserError(
            f"{where}: column {column.name!r} holds {array.type}, expected a list of texts a row, or a struct with one "
            f"named text: store the column so."
        )
    sizes = pc.fill_null(pc.list_value_length(array), 0)
    row = first_true(pc.equal(sizes, 0))
    if row >= 0:
        raise UserError(f"{where}, row {row}: {column.name!r} holds no text, expected at least one: leave the row out.")
    offsets = np.concatenate([[0], np.cumsum(sizes.to_numpy())])
    flat = pc.list_flatten(array)

    def row_of(place: int) -> int:
        return int(np.searchsorted(offsets, place, side="right")) - 1

    texts = _checked_text(flat, column, where, row_of).combine_chunks()
    return pa.chunked_array([pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), texts)])


def _checked_places(array: pa.ChunkedArray, texts: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    is_struct = pa.types.is_struct(array.type) and array.type.get_field_index("answer_start") >= 0
    found = pc.struct_field(array, "answer_start") if is_struct else texts
    is_list = pa.types.is_list(found.type) or pa.types.is_large_list(found.type)
    if not is_list or not pa.types.is_integer(found.type.value_type):
        raise UserError(
            f"{where}: column {column.name!r} holds {array.type}, expected a struct of text and answer_start, a list of "
            "texts and one of whole numbers a row: store the column so."
        )
    sizes, flat = pc.fill_null(pc.list_value_length(found), 0), pc.list_flatten(found)
    row = first_true(pc.not_equal(sizes.cast(pa.int64()), pc.list_value_length(texts).cast(pa.int64())))
    if row >= 0 or flat.null_count:
        raise UserError(
            f"{where}, row {max(row, 0)}: {column.name!r} has texts and places of different number: correct the row."
        )
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes.to_numpy())]), pa.int64())
    return pa.chunked_array([pa.LargeListArray.from_arrays(offsets, flat.cast(pa.int64()).combine_chunks())])


def _check_within(table: pa.Table, column: Column, where: str) -> None:
    if column.within is None:
        return
    cells = (table[name].to_pylist() for name in (column.within, column.name, starts_of(column.name)))
    for row, (whole, texts, starts) in enumerate(zip(*cells, strict=True)):
        for text, start in zip(texts, starts, strict=True):
            if not text or start < 0 or whole[start : start + len(text)] != text:
                raise UserError(
                    f"{where}, row {row}: an answer of {len(text)} characters is not at character {start} of "
                    f"{column.within!r}, as {column.name!r} says: correct the row or leave it out."
                )


def starts_of(name: str) -> str:
    """The column of places beside a column of spans."""
    return f"{name}: starts"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked_label(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    if array.null_count:
        raise bad_label(where, first_true(pc.is_null(array)), None, column)
    if column.names and _is_text(array.type):
        array = _numbers_of_names(array, column, where)
    if not pa.types.is_integer(array.type):
        # Floats that happen to be whole are refused too: they are what pandas makes of a column with holes.
        row = max(first_true(pc.is_nan(array)), 0) if pa.types.is_floating(array.type) else 0
        raise bad_label(where, row, array[row].as_py(), column)
    labels = array.cast(pa.int64(), safe=False)  # a uint64 beyond int64 wraps to a negative number: out of range too
    wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, column.num_labels))
    if column.unlabelled is not None:
        wrong = pc.and_(wrong, pc.not_equal(labels, column.unlabelled))
    row = first_true(wrong)
    if row >= 0:
        raise bad_label(where, row, array[row].as_py(), column)
    return labels


def _checked_flag(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    if array.null_count:
        raise bad_flag(where, first_true(pc.is_null(array)), None, column)
    if not (pa.types.is_boolean(array.type) or pa.types.is_integer(array.type)):
        raise bad_flag(where, 0, array[0].as_py(), column)
    flags = array.cast(pa.int64(), safe=False)
    row = first_true(pc.invert(pc.is_in(flags, pa.array([0, 1]))))
    if row >= 0:
        raise bad_flag(where, row, array[row].as_py(), column)
    return flags


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _numbers_of_names(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    numbers = pc.index_in(array.cast(pa.large_string()), pa.array(column.names, pa.large_string()))
    row = first_true(pc.is_null(numbers))
    if row >= 0:
        raise bad_label(where, row, array[row].as_py(), column)
    return numbers.cast(pa.int64())


def _checked_image(array: pa.ChunkedArray, column: Column, where: str) -> pa.ChunkedArray:
    if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = pc.struct_field(array, "bytes")
    if array.null_count:
        row = first_true(pc.is_null(array))
        raise UserError(
            f"{where}, row {row}: {column.name!r} holds no image bytes, expected those of a picture file: "
            f"embed them in the file or leave the row out."
        )
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        array = array.cast(pa.large_binary())
        _check_pictures(array, where)
        return array
    if isinstance(array.type, pa.FixedShapeTensorType) and pa.types.is_uint8(array.type.value_type):
        return array
    raise UserError(
        f"{where}: column {column.name!r} holds {array.type}, expected picture files as bytes "
        f"(the hub's Image feature): store the images so."
    )


def _check_pictures(array: pa.ChunkedArray, where: str) -> None:
    """Each is decoded: one that breaks in the middle of a run could be neither named before it nor skipped."""
    from privzoo.tasks.pictures import decoded, open_image  # most tasks have no use for PIL

    for row, cell in enumerate(array):
        decoded(open_image(cell.as_buffer(), where, row), where, row)
