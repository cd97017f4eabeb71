"""The hub when it answers, when it does not, and when only its cache does; and the toy world."""

import io
import json
import sys
import time
from dataclasses import replace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from privzoo import hub, toyworld
from privzoo.errors import UserError
from privzoo.tasks.cells import Column
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.few_shot import FewShot

COLUMNS = [Column("sentence", "text"), Column("label", "label", 2)]
ROWS = {"sentence": ["a good one", "a bad one"], "label": [1, 0], "idx": [0, 1]}


@pytest.fixture
def sst2():
    return HubData("nyu-mll/glue", "sst2", "sst2", {"train": "train", "validation": "validation"})


@pytest.fixture
def unreachable_hub(monkeypatch, tmp_path):
    """No offline mode, but the network is off; and an empty cache, whose folder this is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def message_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unreachable_hub_names_the_data_set_the_reason_and_three_ways_out(sst2, unreachable_hub, capsys):
    start = time.perf_counter()
    message = message_of(lambda: sst2.load("train", COLUMNS, None))
    assert time.perf_counter() - start < 20
    for part in (
        "nyu-mll/glue, sst2",
        "the network is off in tests",
        "sst2/train.parquet",
        "data_root=",
        "PRIVZOO_DATA",
    ):
        assert part in message
    for part in ("network", "cache", "task=toy_text"):
        assert part in message
    assert capsys.readouterr() == ("", "")


def test_a_hub_that_hangs_is_given_up(sst2, unreachable_hub, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: time.sleep(60))
    start = time.perf_counter()
    assert "no answer within" in message_of(lambda: sst2.load("train", COLUMNS, None))
    assert time.perf_counter() - start < 20


def test_offline_mode_is_respected_and_named(sst2, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE" in message_of(lambda: sst2.load("train", COLUMNS, None))
    assert datasets.config.HF_HUB_OFFLINE is True


def test_without_network_the_filled_cache_serves(sst2, unreachable_hub, capsys):
    place = unreachable_hub / "nyu-mll___glue" / "sst2" / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    rows = datasets.Dataset.from_dict(ROWS)
    with datasets.arrow_writer.ArrowWriter(path=str(place / "glue-train.arrow"), features=rows.features) as writer:
        writer.write_table(rows.data.table)
        writer.finalize()
    split = datasets.SplitInfo("train", num_examples=2, dataset_name="glue")
    info = datasets.DatasetInfo(
        features=rows.features,
        config_name="sst2",
        dataset_name="glue",
        version="0.0.0",
        splits=datasets.SplitDict({"train": split}),
    )
    info.write_to_directory(str(place))
    table = sst2.load("train", COLUMNS, None)
    assert table.to_pylist() == [{"sentence": "a good one", "label": 1}, {"sentence": "a bad one", "label": 0}]
    assert "validation" in message_of(lambda: sst2.load("validation", COLUMNS, None))
    assert datasets.config.HF_HUB_OFFLINE is False
    assert capsys.readouterr() == ("", "")


def test_the_hub_is_asked_for_name_config_and_split_and_its_rows_are_checked(sst2, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        assert datasets.are_progress_bars_disabled()
        return datasets.Dataset.from_dict(ROWS).select([1, 0])

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sst2.load("train", COLUMNS, None)["label"].to_pylist() == [0, 1]  # the order of the selection
    assert not datasets.are_progress_bars_disabled()
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "train", "revision": None})]
    replace(sst2, revision="refs/convert/parquet").load("train", COLUMNS, None)
    assert asked[1][1]["revision"] == "refs/convert/parquet"
    assert "no column 'sentense'" in message_of(lambda: sst2.load("train", [Column("sentense", "text")], None))
    assert "'label' is 1" in message_of(lambda: sst2.load("train", [Column("label", "label", 1)], None))


def test_a_data_root_is_used_alone(sst2, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    assert "no folder 'sst2'" in message_of(lambda: sst2.load("train", COLUMNS, str(tmp_path)))


def test_files_need_no_datasets_library(folder, source, monkeypatch):
    root = folder(train={"text": ["a"], "label": [1]})
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise
    assert source.load("train", [Column("text", "text")], root).num_rows == 1


def test_toy_rows_are_the_toy_worlds():
    split = "validation"
    text = ToyData("text").load(split, [Column("text", "text"), Column("label", "label", 2)], None)
    assert text.to_pylist() == toyworld.text_rows(split)
    lm = ToyData("lm").load(split, [Column("prompt", "text"), Column("target", "text")], None)
    assert lm.to_pylist() == toyworld.lm_rows(split)
    images = ToyData("images").load(split, [Column("image", "image"), Column("label", "label", 4)], None)
    rows = toyworld.image_rows(split)
    assert images["label"].to_pylist() == [row["label"] for row in rows]
    assert all((cell.to_numpy() == row["image"]).all() for cell, row in zip(images["image"], rows, strict=True))


def test_toy_data_of_no_kind():
    assert "data.kind=sound" in message_of(lambda: ToyData("sound").load("train", COLUMNS, None))
    assert "no column 'sentence'" in message_of(lambda: ToyData("text").load("train", COLUMNS, None))


@pytest.mark.shared
def test_real_sst2(sst2, shared):
    table = sst2.load("train", COLUMNS, str(shared / "data"))
    assert table.num_rows == 67_349
    assert table["label"].to_pylist().count(1) == 37_569
    assert table["sentence"][0].as_py() == "hide new secretions from the parental units "
    assert sst2.load("validation", COLUMNS, str(shared / "data")).num_rows == 872


@pytest.mark.shared
def test_real_images_come_as_bytes(shared):
    source = HubData("uoft-cs/cifar10", None, "cifar10_lossless4k", {"train": "train"})
    columns = [Column("img", "image"), Column("label", "label", 10)]
    table = source.load("train", columns, str(shared / "data"))
    from PIL import Image

    assert table.num_rows == 4_000
    assert Image.open(io.BytesIO(table["img"][0].as_py())).size == (32, 32)


SKIPPING = HubData("mine", None, "mine", {"train": "train", "validation": "dev"}, on_error="skip")
GOOD = [{"sentence": f"good {i}", "label": i % 2} for i in range(20)]
BAD = [{"sentence": None, "label": 0}, {"sentence": "odd", "label": 7}, {"sentence": "no label", "label": None}]


def write_rows(folder, rows, suffix):
    folder.mkdir(exist_ok=True)
    if suffix == "jsonl":
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "csv":
        lines = [",".join("" if cell is None else str(cell) for cell in row.values()) for row in rows]
        (folder / "train.csv").write_text("\n".join(["sentence,label", *lines]))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_skipped_rows_are_counted_and_the_card_says_so(tmp_path, suffix):
    rows = [*GOOD[:7], BAD[0], BAD[1], *GOOD[7:], BAD[2]]
    write_rows(tmp_path / "mine", rows, suffix)
    with pytest.raises(UserError, match=r"row 7: 'sentence' is null|row 22: 'label' is null"):
        replace(SKIPPING, on_error="raise").load("train", COLUMNS, str(tmp_path))
    source = replace(SKIPPING)
    assert source.selection is None
    assert source.load("train", COLUMNS, str(tmp_path)).to_pylist() == GOOD
    assert source.selection == "3 rows of train were not what the task expects and were left out (data.on_error=skip)."
    few = FewShot(replace(SKIPPING), 4, 0)
    assert few.load("train", COLUMNS, str(tmp_path)).num_rows == 8
    assert "4 rows of each class" in few.selection
    assert "3 rows of train" in few.selection


def test_a_file_of_which_nothing_is_left(tmp_path):
    write_rows(tmp_path / "mine", BAD, "jsonl")
    with pytest.raises(UserError, match=r"none of 3 rows is what the task expects; data\.on_error=raise says why"):
        replace(SKIPPING).load("train", COLUMNS, str(tmp_path))


def test_rows_without_a_label_are_left_out_and_not_counted(tmp_path):
    """SNLI's -1 is no mistake."""
    rows = [{"sentence": "nobody agreed", "label": -1}, BAD[1], {"sentence": "nor here", "label": -1}, *GOOD]
    write_rows(tmp_path / "mine", rows, "parquet")
    source = replace(SKIPPING)
    table = source.load("train", [COLUMNS[0], Column("label", "label", 2, unlabelled=-1)], str(tmp_path))
    assert table.to_pylist() == GOOD
    assert source.selection.startswith("1 rows of train")


def test_another_way_than_raise_and_skip():
    with pytest.raises(UserError, match=r"data\.on_error=ignore to be raise or skip"):
        replace(SKIPPING, on_error="ignore")


def test_rows_of_a_csv_that_are_not_utf8_are_skipped_alone(tmp_path):
    """Text, label or key: another row's bytes do not matter."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_bytes(
        b"sentence,label,owner\ngood 0,0,a\nb\xe9d,1,b\ngood 1,1,c\nwell,\xff,d\nok,0,\xfe\ngood 2,0,e\nt\xe9o, many,1,f\n"
    )
    columns = [*COLUMNS, Column("owner", "key")]
    source = replace(SKIPPING)
    found = source.load("train", columns, str(tmp_path)).to_pylist()
    assert found == [row | {"owner": owner} for row, owner in zip(GOOD, "ace", strict=False)]
    assert source.selection.startswith("4 rows of train")
    with pytest.raises(UserError, match=r"train\.csv, line 3 is not UTF-8"):
        replace(SKIPPING, on_error="raise").load("train", columns, str(tmp_path))
