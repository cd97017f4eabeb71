"""The digest of a table: blind to how it lies in memory, to nothing else."""

import io
import re
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.columns import checked_table
from privzoo.tasks.digest import content_digest

COLUMNS = [Column("text", "text"), Column("label", "label", 10)]


def digest(texts, labels, settings="s"):
    return content_digest(checked_table(pa.table({"text": texts, "label": labels}), COLUMNS, "t"), settings)


BASE = (["ab", "c", "é", ""], [0, 1, 2, 3])


@pytest.mark.parametrize(
    "changed",
    [
        (["aB", "c", "é", ""], [0, 1, 2, 3]),  # one character
        (["a", "bc", "é", ""], [0, 1, 2, 3]),  # the same bytes, cut elsewhere
        (["ab", "c", "", "é"], [0, 1, 2, 3]),
        (["c", "ab", "é", ""], [0, 1, 2, 3]),  # order of the text alone
        (["c", "ab", "é", ""], [1, 0, 2, 3]),  # order of whole rows
        (["ab", "c", "é", ""], [0, 1, 2, 4]),  # one label
        (["ab", "c", "é"], [0, 1, 2]),
    ],
)
def test_any_change_of_content_or_order_shows(changed):
    assert digest(*changed) != digest(*BASE)


def test_settings_show():
    assert digest(*BASE, settings="max_length 3") != digest(*BASE, settings="max_length 4")


def test_equal_tables_in_other_layouts_are_equal():
    texts = pa.array(["zz", *BASE[0], "zzz"]).slice(1, 4)
    labels = pa.array([7, 0, 1, 2, 3], pa.int8()).slice(1)
    chunked = pa.chunked_array([pa.array(["ab"]), pa.array([], pa.string()), pa.array(["c", "é", ""])])
    assert digest(texts, labels) == digest(*BASE)
    assert digest(chunked, pa.chunked_array([[0, 1, 2], [3]])) == digest(*BASE)
    assert digest(pa.array(BASE[0], pa.large_string()), BASE[1]) == digest(*BASE)
    assert digest(pa.array(BASE[0]).dictionary_encode(), BASE[1]) == digest(*BASE)


def test_slices_and_chunks_of_a_checked_table_are_equal():
    table = checked_table(pa.table({"text": ["x", *BASE[0]], "label": [9, *BASE[1]]}), COLUMNS, "t")
    assert content_digest(table.slice(1), "s") == digest(*BASE)
    pieces = pa.concat_tables([table.slice(1, 1), table.slice(2, 0), table.slice(2)])
    assert pieces["text"].num_chunks > 1
    assert content_digest(pieces, "s") == digest(*BASE)


def test_empty_texts_only():
    assert digest(["", ""], [0, 0]) != digest([""], [0])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("as_bytes", [False, True])
def test_images(as_bytes):
    def of(pixels, name="image"):
        if as_bytes:
            column = pa.array([{"bytes": png(each), "path": None} for each in pixels])
        else:
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
        return content_digest(checked_table(pa.table({name: column}), [Column(name, "image")], "t"), "s")

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    changed = pixels.copy()
    changed[1, 1, 1, 2] ^= 1
    assert of(pixels) == of(pixels.copy())
    assert len({of(pixels), of(changed), of(pixels[::-1].copy()), of(pixels, "picture")}) == 4
    if not as_bytes:
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
        assert of(pixels[1:].copy()) == content_digest(pa.table({"image": tensors}).slice(1), "s")
        assert of(pixels) != of(pixels.reshape(2, 1, 4, 3))  # the same bytes in another shape


def test_seventy_thousand_rows_take_well_under_a_second():
    table = pa.table({"text": [f"{i} " * 10 for i in range(70_000)], "label": np.arange(70_000) % 10})
    checked = checked_table(table, COLUMNS, "t")
    start = time.perf_counter()
    content_digest(checked, "s")
    assert time.perf_counter() - start < 1


# ---- several texts a row

ANSWERS = [Column("answers", "texts")]


def texts(values, type=None):
    return checked_table(pa.table({"answers": pa.array(values, type)}), ANSWERS, "t")


def test_texts_as_lists_or_as_squad_stores_them():
    plain = texts([["a"], ["b", "é"]])
    squad = texts([{"text": ["a"], "answer_start": [3]}, {"text": ["b", "é"], "answer_start": [1, 2]}])
    assert plain["answers"].to_pylist() == squad["answers"].to_pylist() == [["a"], ["b", "é"]]
    assert content_digest(plain, "s") == content_digest(squad, "s")


def test_the_digest_of_texts_is_blind_to_layout_alone():
    base = content_digest(texts([["a", "b"], ["c"]]), "s")
    chunks = pa.chunked_array([pa.array([["zz"], ["a", "b"]]).slice(1), pa.array([["c"]])])
    assert content_digest(checked_table(pa.table({"answers": chunks}), ANSWERS, "t"), "s") == base
    for other in ([["a"], ["b", "c"]], [["a", "b", "c"]], [["ab"], ["c"]], [["a", "b"], ["d"]], [["c"], ["a", "b"]]):
        assert content_digest(texts(other), "s") != base


@pytest.mark.parametrize(
    ("values", "type", "said"),
    [
        ([["a"], []], None, "t, row 1: 'answers' holds no text"),
        ([["a"], None], None, "t, row 1: 'answers' holds no text"),
        ([["a", "b"], ["c", None]], None, "t, row 1: 'answers' is null"),
        ([["a"], ["b"], [None]], None, "t, row 2: 'answers' is null"),
        (["a"], None, "expected a list of texts a row"),
        ([[{"text": "a"}]], None, "expected a list of texts a row"),
        ([["a"]], pa.list_(pa.string(), 1), "expected a list of texts a row"),
        ([[1]], None, "holds int64 (row 0: 1), expected text"),
        ([[b"a"], [b"b", b"\xff"]], pa.list_(pa.binary()), "expected text"),
    ],
)
def test_bad_texts_are_one_sentence_with_their_row(values, type, said):
    with pytest.raises(UserError, match=re.escape(said)):
        texts(values, type)


def test_texts_that_are_not_utf8_name_their_row():
    flat = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], "<i4").tobytes()), pa.py_buffer(b"ab\xff"))
    array = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), flat)
    with pytest.raises(UserError, match="row 1: 'answers' is not UTF-8"):
        checked_table(pa.table({"answers": array}), ANSWERS, "t")


@pytest.mark.parametrize("labels", [[0, -1, 2, -1], pa.array([0, -1, 2, -1], pa.int8())])
def test_rows_that_nobody_labelled_are_left_out(labels):
    """By their own label alone, whatever stands beside them."""
    columns = [Column("text", "text"), Column("label", "label", 3, unlabelled=-1)]
    table = checked_table(pa.table({"text": ["a", "b", "c", "d"], "label": labels}), columns, "t")
    assert table.to_pylist() == [{"text": "a", "label": 0}, {"text": "c", "label": 2}]
    for wrong in (-2, 3):
        with pytest.raises(UserError, match=f"t, row 1: 'label' is {wrong}, expected an integer from 0 to 2"):
            checked_table(pa.table({"text": ["a", "b"], "label": [0, wrong]}), columns, "t")
    with pytest.raises(UserError, match="t: 'label' is -1, no label, in all rows"):
        checked_table(pa.table({"text": ["a"], "label": [-1]}), columns, "t")
    with pytest.raises(UserError, match="'label' is -1, expected an integer"):
        checked_table(pa.table({"text": ["a"], "label": [-1]}), [Column("label", "label", 3)], "t")
