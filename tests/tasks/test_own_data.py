"""A user's own file: split by content, owners as units, rows that are wrong (PRIVACY 1, 24, 37)."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.few_shot import FewShot
from privzoo.tasks.own_data import OwnData
from privzoo.tasks.own_task import own_task
from privzoo.tasks.text_blocks import TextBlocks
from privzoo.tasks.units import UNIT, RowsOfUnits

TEXT, LABEL = Column("text", "text"), Column("label", "label", 2, names=("bad", "good"))
ROWS = [{"text": f"text {i}", "label": i % 2, "user": f"u{i % 37}", "id": i} for i in range(300)]


@pytest.fixture
def write(tmp_path):
    """`write(rows, "x.jsonl")`: the path of such a file."""

    def made(rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        elif name.endswith(".csv"):
            lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
            path.write_text("\n".join(lines) + "\n")
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    return made


def texts(data, split, columns=(TEXT, LABEL)):
    return data.load(split, list(columns), None)["text"].to_pylist()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_all_formats_hold_the_same_rows(name, write):
    data = OwnData(write(ROWS, name), owner="user", id="id")
    train, validation = (data.load(split, [TEXT, LABEL], None) for split in ("train", "validation"))
    assert sorted(train["text"].to_pylist() + validation["text"].to_pylist()) == sorted(row["text"] for row in ROWS)
    assert train["label"].to_pylist() == [int(text.split()[1]) % 2 for text in train["text"].to_pylist()]
    assert UNIT in train.column_names
    assert UNIT not in validation.column_names
    expected = OwnData(write(ROWS, "again.jsonl"), owner="user").load("train", [TEXT, LABEL], None)
    assert train.equals(expected)


def test_one_row_less_moves_no_other(write):
    """Who trains and who is scored hangs on a row's own content: not on its place, nor on how many there are."""
    before = {split: set(texts(OwnData(write(ROWS)), split)) for split in ("train", "validation")}
    assert 10 <= len(before["validation"]) <= 60  # 30 are expected
    for gone in (0, 150, 299):
        fewer = OwnData(write([row for row in ROWS[::-1] if row["id"] != gone], "fewer.jsonl"))
        for split, known in before.items():
            assert set(texts(fewer, split)) == known - {f"text {gone}"}
    shares = [len(texts(OwnData(write(ROWS), validation_share=share), "validation")) for share in (0.2, 0.5)]
    assert 30 <= shares[0] <= 90 < shares[1] <= 200
    other = set(texts(OwnData(write(ROWS), split_seed=1), "validation"))
    assert other != before["validation"]


def test_equal_rows_stay_together(write):
    """None is trained on and scored."""
    data = OwnData(write([{"text": f"t{i % 20}", "label": i % 2} for i in range(200)]))
    assert not set(texts(data, "train")) & set(texts(data, "validation"))


def test_owners_are_units(write):
    """All rows of an owner are one unit, and of one split; an owner's leaving moves no other's rows."""
    data = OwnData(write(ROWS), owner="user")
    train = data.load("train", [TEXT], None)
    owner_of = {row["text"]: row["user"] for row in ROWS}
    owners = [owner_of[text] for text in train["text"].to_pylist()]
    numbers = train[UNIT].to_pylist()
    assert len(set(numbers)) == len(set(owners)) == max(numbers) + 1
    assert len(set(zip(owners, numbers, strict=True))) == len(set(owners))
    scored = {owner_of[text] for text in texts(data, "validation")}
    assert scored
    assert not scored & set(owners)
    gone = owners[0]
    fewer = OwnData(write([row for row in ROWS if row["user"] != gone], "fewer.jsonl"), owner="user")
    assert texts(fewer, "train") == [text for text in texts(data, "train") if owner_of[text] != gone]
    assert (
        data.selection == "A unit of privacy is an owner, by the column 'user': all rows of one owner are one contribution."
    )


def test_an_owner_has_so_many_rows_at_most(write):
    """They are chosen by the owner's rows alone."""
    data = OwnData(write(ROWS), owner="user", rows_per_owner=3)
    train = data.load("train", [TEXT, LABEL], None)
    assert np.bincount(train[UNIT].to_numpy()).tolist() == [3] * len(set(train[UNIT].to_pylist()))
    kept, gone = set(train["text"].to_pylist()), ROWS[5]["user"]
    fewer = OwnData(write([row for row in ROWS[::-1] if row["user"] != gone], "fewer.jsonl"), owner="user", rows_per_owner=3)
    assert set(texts(fewer, "train")) == {text for text in kept if ROWS[int(text.split()[1])]["user"] != gone}
    assert "at most 3 rows" in data.selection


def test_a_task_counts_owners(write, gpt_tokenizer):
    """PRIVACY 1 and 37: N is the number of owners, and the plan draws them."""
    rows = [row | {"id": str(row["id"])} for row in ROWS]
    data = OwnData(write(rows), owner="user", rows_per_owner=4, columns={"prompt": "text", "response": "id"})
    task = own_task("jsonl", "instruction", data, max_length=16)
    task.load(None)
    task.prepare(gpt_tokenizer)
    assert (task.unit, task.num_examples) == ("owner", len(task.rows_of_unit))
    assert len(task.train) == 4 * task.num_examples
    assert sorted(int(row) for unit in task.rows_of_unit for row in unit) == list(range(len(task.train)))
    whole = own_task("jsonl", "instruction", OwnData(write(rows), columns=data._names), max_length=16)
    whole.load(None)
    assert (whole.unit, whole.rows_of_unit) == ("example", None)
    assert 240 <= whole.num_examples == len(whole._tables["train"]) < 300
    assert whole.fingerprint() != task.fingerprint()


def test_rows_of_units_need_a_row():
    with pytest.raises(ValueError, match="none of unit 1"):
        RowsOfUnits(np.array([0, 2]))
    assert [unit.tolist() for unit in RowsOfUnits(np.array([2, 0, 2, 1]))] == [[1], [3], [0, 2]]


BAD = [
    ({"text": "x", "label": 2}, "'label' is 2, expected one of the declared names"),
    (
        {"text": "x", "label": "ugly"},
        "'label' is 'ugly', expected one of the declared names (bad, good) or an integer from 0 to 1",
    ),
    ({"text": 7, "label": 0}, "'text' is 7, expected text"),
    ({"label": 0}, "has no 'text'"),
    ({"text": None, "label": 0}, "'text' is null"),
    ("{no json", "line 301 is not JSON"),
    ("[1]", "line 301 is a list"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_wrong_row_is_named_or_skipped(row, message, write):
    path = write([*ROWS, row])
    with pytest.raises(UserError) as caught:
        OwnData(path).load("train", [TEXT, LABEL], None)
    assert message in str(caught.value)
    assert "301" in str(caught.value) or "row 300" in str(caught.value)
    data = OwnData(path, on_error="skip")
    assert texts(data, "train") == texts(OwnData(write(ROWS, "good.jsonl")), "train")
    assert data.selection == "1 rows of the file were not what the task expects and were left out (data.on_error=skip)."


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_wrong_rows_of_other_formats_are_skipped_alone(name, write):
    rows = [row | {"label": 9 if i in (3, 4, 250) else row["label"]} for i, row in enumerate(ROWS)]
    with pytest.raises(UserError, match=r"row 3: 'label' is '?9'?"):
        OwnData(write(rows, name)).load("train", [TEXT, LABEL], None)
    data = OwnData(write(rows, name), on_error="skip")
    good = [row for i, row in enumerate(ROWS) if i not in (3, 4, 250)]
    assert texts(data, "train") == texts(OwnData(write(good, "good.jsonl")), "train")
    assert "3 rows of the file" in data.selection


def test_labels_by_their_declared_names(write):
    rows = [{"text": f"t{i}", "label": ("bad", "good")[i % 2]} for i in range(60)]
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        table = OwnData(write(rows, name)).load("train", [TEXT, LABEL], None)
        assert table["label"].to_pylist() == [int(text[1:]) % 2 for text in table["text"].to_pylist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "id"}, "'id' '7' is that of 2 rows"),
        ({"id": "id", "on_error": "skip"}, "'id' '7' is that of 2 rows"),
        ({"owner": "nobody"}, "has no column 'nobody'"),
        ({"rows_per_owner": 3}, "beside task.data.owner=<column>"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"on_error": "ignore"}, "data.on_error=ignore"),
        ({"path": None}, "data.path=<file>"),
        ({"path": "x.txt"}, "none of .parquet, .jsonl, .csv, .json"),
        ({"path": "gone.jsonl"}, "does not exist"),
    ],
    ids=lambda each: str(each),
)
def test_mistakes_are_one_sentence(changes, message, write):
    rows = [*ROWS, ROWS[0] | {"id": 7, "text": "another"}]
    with pytest.raises(UserError) as caught:
        OwnData(**{"path": write(rows), **changes}).load("train", [TEXT, LABEL], None)
    assert message in str(caught.value)


def test_an_owner_of_both_files_is_refused(write):
    """What is scored would be theirs, without noise."""
    data = OwnData(write(ROWS[:200]), validation_path=write(ROWS[200:], "other.jsonl"), owner="user")
    assert len(texts(data, "train")) == 200
    with pytest.raises(UserError, match="37 owners have rows here and in"):
        data.load("validation", [TEXT], None)
    apart = [row | {"user": f"v{row['user']}"} for row in ROWS[200:]]
    data = OwnData(write(ROWS[:200]), validation_path=write(apart, "apart.jsonl"), owner="user")
    assert (len(texts(data, "train")), len(texts(data, "validation"))) == (200, 100)


def test_a_row_of_both_files_is_refused(write):
    """In whatever order, and though most rows are others: its score would be published without noise."""
    data = OwnData(write(ROWS[:200]), validation_path=write([*ROWS[250:], ROWS[17], ROWS[3]], "other.jsonl"))
    assert len(texts(data, "train")) == 200
    with pytest.raises(UserError, match="2 rows are here and in"):
        texts(data, "validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"txt": "text"}}, "names 'txt', which the task does not read: it reads text, label"),
        ({"columns": "text"}, "to name columns"),
        ({"columns": {"text": 0}}, "to name columns"),
        ({"owner": 5}, "to name columns"),
    ],
    ids=str,
)
def test_columns_are_names(changes, message, write):
    with pytest.raises(UserError, match=message):
        OwnData(write(ROWS), **changes).load("train", [TEXT, LABEL], None)


def test_a_first_row_that_is_wrong_is_skipped_too(write):
    for first in ("{no json", {"label": 1}):
        assert texts(OwnData(write([first, *ROWS]), on_error="skip"), "train") == texts(
            OwnData(write(ROWS, "g.jsonl")), "train"
        )


def test_rows_of_csv_that_are_wrong(write, tmp_path):
    good = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(60))
    path = tmp_path / "ragged.csv"
    path.write_text(good + "a,b,c,1\n")
    with pytest.raises(UserError, match="row 60 has 4 cells, expected 2 as the header"):
        texts(OwnData(str(path)), "train")
    data = OwnData(str(path), on_error="skip")
    assert len(texts(data, "train")) + len(texts(data, "validation")) == 60
    path.write_text(good + '"open,1\n' + "t99,0\n")
    with pytest.raises(UserError, match="a quote that is not closed"):
        texts(OwnData(str(path)), "train")


@pytest.mark.parametrize("names", ["bad,good", {0: "bad", 1: "good"}, 5, ["1", 1], [1, 0], [1, 2]], ids=str)
def test_label_names_are_a_list_of_names(names, write):
    """Numbers as names other than 0, 1, … would mean one class in a JSON file and another in a CSV file."""
    with pytest.raises(UserError, match=r"task\.label_names"):
        own_task("jsonl", "classification", OwnData(write(ROWS)), 16, label_names=names)
    assert own_task("jsonl", "classification", OwnData(write(ROWS)), 16, label_names=[0, 1]).num_labels == 2


@pytest.mark.parametrize("option", [{"prompt": "{text}"}, {"target": "{text}"}, {"complete": 5}], ids=str)
def test_a_classifier_completes_nothing(option, write):
    with pytest.raises(UserError, match=r"to be null for task\.kind=classification"):
        own_task("jsonl", "classification", OwnData(write(ROWS)), 16, label_names=["a", "b"], **option)


def test_kinds_that_cannot_hold_owners_refuse_them(write):
    """They would be units of privacy that are not kept."""
    with pytest.raises(UserError, match="owner"):
        FewShot(OwnData(write(ROWS), owner="user"), 3, 0)
    rows = write([{"text": "a b c", "user": i} for i in range(40)], "t.jsonl")
    with pytest.raises(UserError, match="owner"):
        TextBlocks("t", OwnData(rows, owner="user"), "text", 5, 16).load(None)


def test_an_owner_without_a_name(write):
    for owner in ("", None, 1.5, True):
        with pytest.raises(UserError, match="row 300: 'user' is"):
            OwnData(write([*ROWS, ROWS[0] | {"user": owner}]), owner="user").load("train", [TEXT], None)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("classification", {}, "task.label_names=None"),
        ("classification", {"label_names": ["a", "a"]}, "two or more different names"),
        ("answering", {}, "Unknown task.kind=answering"),
        ("text", {"complete": 5}, "there is no prompt to complete"),
        ("instruction", {"pair": True}, "task.pair=true to be false"),
        ("text", {"label_names": ["a", "b"]}, "task.label_names=.* to be null for task.kind=text"),
    ],
)
def test_kinds_are_checked(kind, changes, message, write):
    with pytest.raises(UserError, match=message):
        own_task("jsonl", kind, OwnData(write(ROWS)), 16, **changes)


def test_an_id_comes_once_in_both_files(write):
    other = write([row | {"text": f"other {row['id']}"} for row in ROWS[200:]], "v.jsonl")
    for first, message in ((ROWS, "rows.jsonl, too"), ([*ROWS, ROWS[3]], r"2 rows .sound rows \[3, 300\]")):
        data = OwnData(write(first), other, id="id")
        with pytest.raises(UserError, match=f"'id' '(200|3)' is that of (a row of .*)?{message}"):
            _ = data.load("train", [TEXT], None), data.load("validation", [TEXT], None)
    data = OwnData(write(ROWS[:200]), other, id="id")
    assert [data.load(split, [TEXT], None).num_rows for split in ("train", "validation")] == [200, 100]


def test_a_number_of_thousands_of_digits(write):
    rows = [*(json.dumps(row) for row in ROWS), '{"text": "x", "label": ' + "9" * 5000 + "}"]
    with pytest.raises(UserError, match="line 301 is not JSON"):
        OwnData(write(rows)).load("train", [TEXT, LABEL], None)
    data = OwnData(write(rows), on_error="skip")
    assert sum(data.load(split, [TEXT, LABEL], None).num_rows for split in ("train", "validation")) == 300


def test_a_blank_answer_is_refused_or_skipped(write):
    rows = [{"prompt": f"p{i}", "response": " " if i == 5 else "r"} for i in range(40)]
    with pytest.raises(UserError, match="row 5: 'response' is blank"):
        own_task("jsonl", "instruction", OwnData(write(rows)), 16).load(None)
    task = own_task("jsonl", "instruction", OwnData(write(rows), on_error="skip"), 16)
    task.load(None)
    assert task.num_examples + len(task._tables["validation"]) == 39
