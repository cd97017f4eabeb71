"""Bad files and honest ones: what a user's folder may hold, and what is said about it."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.files import find_split

TEXT = [Column("text", "text"), Column("label", "label", 2)]


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "a=b" / "set"  # Arrow takes such a folder's name for a column, if it is let
    place.mkdir(parents=True)
    return place


@pytest.fixture
def load(place, source):
    return lambda columns=TEXT, split="train": source.load(split, columns, str(place.parent))


def fails(load, *expected):
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def write_rows(place, rows, suffix):
    """The same rows as Parquet, JSON lines or CSV, each written by hand or by another writer than the reader's."""
    if suffix == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    elif suffix == "jsonl":
        (place / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        quoted = ['"{}",{}'.format(row["text"].replace('"', '""'), row["label"]) for row in rows]
        (place / "train.csv").write_text("\n".join(["text,label", *quoted]) + "\n")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_every_format_gives_the_same_rows_and_nothing_is_coerced(place, load, suffix):
    texts = [
        "007",
        "nan",
        "null",
        "NA",
        "",
        "2024-01-31",
        "true",
        "a, b",
        'say "x"',
        "two\nlines",
        "\u2028é😀",
        " pad ",
    ]
    rows = [{"text": text, "label": i % 2, "other": None} for i, text in enumerate(texts)]
    write_rows(place, rows, suffix)
    table = load()
    assert table.to_pylist() == [{"text": row["text"], "label": row["label"]} for row in rows]
    assert table.schema.types == [pa.large_string(), pa.int64()]


def test_reading_writes_nothing(place, load):
    write_rows(place, [{"text": "a", "label": 1}], "parquet")
    load()
    assert [path.name for path in place.parent.rglob("*")] == ["set", "train.parquet"]


def test_a_byte_order_mark_is_no_part_of_the_data(place, load):
    (place / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\nx,1\n")
    assert load().to_pylist() == [{"text": "x", "label": 1}]
    (place / "train.csv").unlink()
    (place / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x", "label": 1}\n')
    assert load().to_pylist() == [{"text": "x", "label": 1}]


def test_a_cell_longer_than_arrows_block(place, load):
    (place / "train.csv").write_text("text,label\n" + "y" * 3_000_000 + ",1\nz,0\n")
    assert [len(text) for text in load()["text"].to_pylist()] == [3_000_000, 1]


def test_the_root_is_not_a_folder(tmp_path, source):
    fails(lambda: source.load("train", TEXT, str(tmp_path / "gone")), "data_root=", "is not a folder", "'set'")


def test_the_root_lacks_the_data_set(place, source, tmp_path):
    fails(lambda: source.load("train", TEXT, str(tmp_path)), "no folder 'set'", "found a=b", "unset it")


def test_a_missing_split_is_never_invented(place, load):
    write_rows(place, [{"text": "a", "label": 1}], "parquet")
    fails(lambda: load(split="validation"), "no split 'validation'", "found train.parquet", "validation.csv")


def test_a_split_that_the_task_does_not_name(place, load):
    fails(lambda: load(split="test"), "no 'test' among its splits (train, validation)", "data.splits.test")


def test_the_hubs_name_of_the_split_is_the_files(place):
    (place / "validation_matched.csv").write_text("text,label\nx,1\n")
    assert find_split(str(place.parent), "set", "validation_matched").name == "validation_matched.csv"


def test_two_files_for_one_split(place, load):
    write_rows(place, [{"text": "a", "label": 1}], "parquet")
    write_rows(place, [{"text": "b", "label": 1}], "csv")
    fails(load, "train.parquet and train.csv", "one file", "remove")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_missing_column(place, load, suffix):
    write_rows(place, [{"text": "a", "label": 1}], suffix)
    fails(lambda: load([Column("texts", "text")]), "no column 'texts'", "did you mean 'text'", "found text, label")


def test_a_column_twice(place, load):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "label"])
    pyarrow.parquet.write_table(table, place / "train.parquet")
    fails(load, "several columns named 'text'")
    (place / "train.parquet").unlink()
    (place / "train.csv").write_text("text,text,label\na,b,1\n")
    fails(load, "several columns named 'text'")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_empty_file(place, load, suffix):
    (place / f"train.{suffix}").touch()
    fails(load, f"train.{suffix} is empty (0 bytes)")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_zero_rows(place, load, suffix):
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    pyarrow.parquet.write_table(schema.empty_table(), place / "train.parquet")
    if suffix != "parquet":
        (place / "train.parquet").unlink()
        (place / f"train.{suffix}").write_text("text,label\n" if suffix == "csv" else "\n")
    fails(load, f"train.{suffix}", "0 rows")


@pytest.mark.parametrize("junk", [b"not parquet at all", "cut"])
def test_corrupt_parquet(place, load, junk):
    write_rows(place, [{"text": "a", "label": 1}] * 50, "parquet")
    path = place / "train.parquet"
    path.write_bytes(path.read_bytes()[:-20] if junk == "cut" else junk)
    fails(load, "train.parquet cannot be read as parquet (", "anew")


def test_damaged_pages_with_checksums(place, load):
    path = place / "train.parquet"
    table = pa.table({"text": ["abcdefgh" * 20], "label": [1]})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **plain)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"abcdefgh", b"abcdefgX", 1))
    fails(load, "cannot be read as parquet", "CRC")


# row 0 is good in every one of these
BAD_JSONL = {
    '{"text": null, "label": 1}': ["row 1", "'text' is null", "expected text"],
    '{"text": 5, "label": 1}': ["row 1", "'text' is 5"],
    '{"text": NaN, "label": 1}': ["row 1", "'text' is nan"],
    '{"text": ["a"], "label": 1}': ["row 1", "'text' is ['a']"],
    '{"text": "\\ud800", "label": 1}': ["row 1", "ud800"],
    '{"text": "a", "label": 2}': ["row 1", "'label' is 2", "0 to 1"],
    '{"text": "a", "label": -1}': ["row 1", "'label' is -1"],
    '{"text": "a", "label": 1.0}': ["row 1", "'label' is 1.0", "an integer"],
    '{"text": "a", "label": "1"}': ["row 1", "'label' is '1'"],
    '{"text": "a", "label": true}': ["row 1", "'label' is True"],
    '{"text": "a", "label": null}': ["row 1", "'label' is null"],
    '{"text": "a", "label": 99999999999999999999999}': ["row 1", "'label' is 99999999999999999999999"],
    '{"label": 1}': ["row 1", "no 'text'"],
    '["a", 1]': ["line 2", "list", "object"],
    '{"text": "a", "label": 1': ["line 2", "not JSON"],
}


@pytest.mark.parametrize("line", BAD_JSONL)
def test_bad_jsonl_row(place, load, line):
    (place / "train.jsonl").write_text('{"text": "good", "label": 0}\n' + line + "\n")
    fails(load, "train.jsonl", *BAD_JSONL[line])


# row 0 is good; "" (quoted) would be an empty text, which is allowed
BAD_CSV = {
    ",1": ["row 1", "'text' is null"],
    "a,": ["row 1", "'label' is null"],
    "a,2": ["row 1", "'label' is 2", "0 to 1"],
    "a,-1": ["row 1", "'label' is -1"],
    "a,1.0": ["row 1", "'label' is '1.0'", "an integer"],
    "a,positive": ["row 1", "'label' is 'positive'"],
    "a,nan": ["row 1", "'label' is 'nan'"],
    "a, 1": ["row 1", "'label' is ' 1'"],
    "a,99999999999999999999999": ["row 1", "'label' is '99999999999999999999999'"],
    "a,1,extra": ["has 3 cells, expected 2 as the header"],
    "alone": ["has 1 cells, expected 2 as the header"],
}


@pytest.mark.parametrize("line", BAD_CSV)
def test_bad_csv_row(place, load, line):
    (place / "train.csv").write_text("text,label\ngood,0\n" + line + "\n")
    fails(load, "train.csv", *BAD_CSV[line])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": ["a", None], "label": [0, 1]}, ["row 1", "'text' is null"]),
        ({"text": [1.5, float("nan")], "label": [0, 1]}, ["row 1", "nan", "expected text"]),
        ({"text": [7, 8], "label": [0, 1]}, ["'text' holds int64", "row 0: 7", "expected text"]),
        ({"text": [b"a", b"b"], "label": [0, 1]}, ["'text' holds binary"]),
        ({"text": [None, None], "label": [0, 1]}, ["row 0", "'text' is null"]),
        ({"text": ["a", "b"], "label": [0, 2]}, ["row 1", "'label' is 2", "0 to 1"]),
        ({"text": ["a", "b"], "label": [0, -1]}, ["row 1", "'label' is -1"]),
        ({"text": ["a", "b"], "label": [0, None]}, ["row 1", "'label' is null"]),
        ({"text": ["a", "b"], "label": [0.0, float("nan")]}, ["row 1", "'label' is nan"]),
        ({"text": ["a", "b"], "label": [0.0, 1.0]}, ["row 0", "'label' is 0.0", "an integer"]),
        ({"text": ["a", "b"], "label": ["0", "1"]}, ["row 0", "'label' is '0'"]),
        ({"text": ["a", "b"], "label": [True, False]}, ["row 0", "'label' is True"]),
        ({"text": ["a", "b"], "label": pa.array([0, 2**64 - 1], pa.uint64())}, ["row 1", "18446744073709551615"]),
    ],
)
def test_bad_parquet_column(place, load, columns, expected):
    pyarrow.parquet.write_table(pa.table(columns), place / "train.parquet")
    fails(load, "train.parquet", *expected)


def test_not_utf8(place, load):
    (place / "train.csv").write_bytes("text,label\nfine,0\ncaf\xe9,1\n".encode("latin-1"))
    fails(load, "train.csv, line 3 is not UTF-8")
    (place / "train.csv").write_bytes("text,label\nfine,0\n".encode("utf-16"))
    fails(load, "train.csv, line 1 is not UTF-8")
    (place / "train.csv").unlink()
    (place / "train.jsonl").write_bytes(b'{"text": "fine", "label": 0}\n{"text": "caf\xe9", "label": 1}\n')
    fails(load, "train.jsonl, line 2 is not UTF-8")
    (place / "train.jsonl").unlink()
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pa.table({"text": text, "label": [0, 1]}), place / "train.parquet")
    fails(load, "train.parquet, row 1", "not UTF-8")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_files_hold_no_images(place, load, suffix):
    write_rows(place, [{"text": "a", "label": 1}], suffix)
    fails(lambda: load([Column("text", "image")]), "cannot hold images", "Parquet")


def test_dictionary_and_small_integer_columns_are_read_exactly(place, load):
    columns = {"text": pa.array(["b", "a", "b"]).dictionary_encode(), "label": pa.array([1, 0, 1], pa.int8())}
    pyarrow.parquet.write_table(pa.table(columns), place / "train.parquet")
    assert load().to_pylist() == [{"text": t, "label": n} for t, n in [("b", 1), ("a", 0), ("b", 1)]]


# ---- several texts a row

ANSWERS = [Column("answers", "texts")]


def test_json_lines_and_parquet_give_the_same_texts(place, load):
    rows = [{"answers": ["a", "2024-01-31"]}, {"answers": {"text": ["b"], "answer_start": [4]}}]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(ANSWERS)["answers"].to_pylist() == [["a", "2024-01-31"], ["b"]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((value, "expected a list of texts") for value in ("a", 3, None, {"texts": ["a"]}, {"text": "a"})),
        *((value, "expected text") for value in (["a", 3], ["a", None])),
    ],
)
def test_json_lines_with_something_else_than_texts(place, load, value, said):
    (place / "train.jsonl").write_text(json.dumps({"answers": ["x"]}) + "\n" + json.dumps({"answers": value}) + "\n")
    fails(lambda: load(ANSWERS), "row 1", "'answers' is", said)


def test_csv_holds_no_lists(place, load):
    (place / "train.csv").write_text("answers\na\n")
    fails(lambda: load(ANSWERS), "CSV cannot hold lists of texts such as 'answers'", "JSON lines")
