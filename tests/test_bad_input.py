"""A user's mistake: one sentence with the way out, exit code 2, nothing half-written."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from privzoo.errors import RunLost
from privzoo.models.loading import load
from privzoo.saving import save_model

QUICK = ["trainer.accelerator=cpu", "trainer.progress=false", "epochs=0.1"]
SST2 = ["task=sst2", "model=tiny_encoder", "task.max_length=64", "batch_size=4", "delta=1e-3"]


def write_data(folder: Path, train: list[dict] | str | None = None, validation: list[dict] | None = None) -> Path:
    for split, rows in (("train", train), ("validation", validation)):
        good = [{"sentence": f"a good film number {i}", "label": i % 2} for i in range(40 if split == "train" else 25)]
        rows = good if rows is None else rows
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "sst2").mkdir(exist_ok=True)
        (folder / "sst2" / f"{split}.jsonl").write_text(text)
    return folder


def refused(privzoo, tmp_path: Path, *argv: str) -> str:
    """The sentence with which a command is refused; checks that it is one, and that nothing was left behind."""
    code, output = privzoo(*argv, f"output_dir={tmp_path}/runs")
    assert code == 2, output
    assert "Traceback" not in output
    lines = output.strip().splitlines()
    assert len(lines) == 1, output
    assert lines[0].startswith("privzoo: ")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    return lines[0]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("bachsize=4", "did you mean 'batch_size'"),
        ("task=toy_txt", "toy_text"),
        ("method=dp_bitfitt", "dp_bitfit"),
        ("eps=0", "> 0"),
        ("eps=-1", "> 0"),
        ("eps=much", "eps=much"),
        ("eps=nan", "eps=nan"),
        ("eps=3,8", "add -m"),
        ("delta=0.1", "1/N"),
        ("batch_size=100000", "N=8000"),
        ("lr=-1", "lr=-1"),
        ("model.path=/nowhere/at/all", "/nowhere/at/all"),
        ("resume=/tmp", "ledger.jsonl"),
        ("data_root=/nowhere", "/nowhere"),
        ("method.trainable=nothing_matches", "nothing_matches"),
        ("method.schedule=cosine", "cosine"),
        ("model.dropout=1", "0 <= model.dropout < 1"),
        ("model.dropout=some", "model.dropout"),
        ("task.max_length=long", "task.max_length=long"),
        ("trainer.accelerator=mps", "trainer.accelerator=mps is not to be had here"),
        ("privacy.noise_multiplier=1", "eps=null"),
        ("model.dropout=0.1 trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing=false, or model.dropout"),
    ],
)
def test_a_wrong_value(privzoo, tmp_path, override, hint):
    assert hint in refused(privzoo, tmp_path, *QUICK, *override.split())


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([{"text": "a", "label": 0}], "sentence"),
        ([{"sentence": "a", "label": 7}], "7"),
        ([{"sentence": None, "label": 0}], "null"),
        ([{"sentence": "a", "label": None}], "label"),
        ("", "train.jsonl"),
        ("{cut sho", "train.jsonl"),
    ],
)
def test_wrong_data(privzoo, tmp_path, rows, hint):
    if not isinstance(rows, str):
        rows = [{"sentence": "fine", "label": 1}] * 20 + rows
        rows = [dict.fromkeys(rows[-1], "fine") | {"label": 1} for _ in range(20)] + rows[-1:]
    folder = write_data(tmp_path, train=rows)
    assert hint in refused(privzoo, tmp_path, *QUICK, *SST2, f"data_root={folder}")


def test_a_missing_split_is_never_invented(privzoo, tmp_path):
    folder = write_data(tmp_path)
    (folder / "sst2" / "validation.jsonl").unlink()
    assert "validation" in refused(privzoo, tmp_path, *QUICK, *SST2, f"data_root={folder}")


def test_training_rows_are_not_validation_rows(privzoo, tmp_path):
    """PRIVACY 22: their scores would be published without noise."""
    folder = write_data(tmp_path)
    (folder / "sst2" / "validation.jsonl").unlink()
    (folder / "sst2" / "validation.jsonl").symlink_to(folder / "sst2" / "train.jsonl")
    assert "are the same 40 rows" in refused(privzoo, tmp_path, *QUICK, *SST2, f"data_root={folder}")


def test_good_data_of_the_user_train(privzoo, tmp_path):
    """What the refusals above are a hair's breadth from."""
    folder = write_data(tmp_path)
    code, output = privzoo(*QUICK, *SST2, f"data_root={folder}", f"output_dir={tmp_path}/runs")
    assert code == 0, output


def test_edited_data_on_resume_are_new_data(privzoo, tmp_path):
    """PRIVACY 35: another fingerprint, another digest; the lost release is drawn anew and paid again."""
    folder = write_data(tmp_path)
    kill = {"at": "fsync ledger.jsonl", "count": 2, "when": "after"}
    argv = [*SST2, "trainer.accelerator=cpu", "epochs=0.5", f"data_root={folder}", f"output_dir={tmp_path}/runs"]
    code, output = privzoo(*argv, kill=kill)
    assert code == -9, output
    (run,) = (tmp_path / "runs").iterdir()
    write_data(tmp_path, train=[{"sentence": f"a bad film number {i}", "label": i % 2} for i in range(40)])
    code, output = privzoo(f"resume={run}")
    assert code == 0, output
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len({entry["digest"] for entry in entries}) == 2
    assert json.loads((run / "result.json").read_text())["epsilon_spent"] <= 8


def test_an_unreachable_hub_names_the_ways_out(privzoo, tmp_path):
    sentence = refused(privzoo, tmp_path, *QUICK, "task=sst2", "model=tiny_encoder")
    assert "glue" in sentence
    assert "data_root" in sentence


def test_a_folder_that_is_not_a_model(privzoo, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no model here")
    assert "notes" in refused(privzoo, tmp_path, *QUICK, f"model.path={tmp_path}/notes")


@pytest.mark.parametrize("content", [None, "", "{}", '{"schema_version": 1}'])
def test_evaluate_on_what_is_not_a_run(privzoo, tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    code, output = privzoo(f"run={tmp_path}", module="privzoo.evaluate")
    assert code == 2
    assert "Traceback" not in output


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 700 kB; a function makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_written(privzoo_on_few_rows, small_disk):
    """The checkpoint of dp_full does not fit: exit code 1, no half file; with room, the run goes on to its end."""
    disk, make_room = small_disk
    argv = ["method=dp_full", "batch_size=100", "epochs=0.4", "trainer.checkpoint_every=2", "trainer.accelerator=cpu"]
    code, output = privzoo_on_few_rows(*argv, f"output_dir={disk}/runs")
    assert code == 1, output
    assert "Traceback" not in output
    assert "resume=" in output
    (run,) = (disk / "runs").iterdir()
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
    make_room()
    code, output = privzoo_on_few_rows(f"resume={run}")
    assert code == 0, output
    releases = [json.loads(line)["release"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert releases == list(range(len(releases)))


def test_a_model_that_does_not_fit_on_the_disk(small_disk):
    """safetensors reports a full disk by an error of its own; nothing half-written stays, and what was there stays."""
    disk, _ = small_disk
    loaded = load("tiny_encoder", "sequence_classification", num_labels=2)
    (disk / "run" / "model").mkdir(parents=True)
    config = BertConfig(vocab_size=5000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    sentence = r"model cannot be written \(.*No space left on device.*\): make room and go on with resume="
    with pytest.raises(RunLost, match=sentence):
        save_model(disk / "run" / "model", BertForSequenceClassification(config), loaded.processor)
    assert [path.name for path in (disk / "run").iterdir()] == ["model"]


def test_two_processes_in_one_run_folder(privzoo_on_few_rows, tmp_path):
    """The second one is told that the ledger is in use."""
    import fcntl

    code, _ = privzoo_on_few_rows(
        *QUICK, f"output_dir={tmp_path}", kill={"at": "fsync ledger.jsonl", "count": 1, "when": "after"}
    )
    assert code == -9
    (run,) = tmp_path.iterdir()
    with open(run / "ledger.jsonl", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, output = privzoo_on_few_rows(f"resume={run}")
        assert (code, "in use" in output) == (2, True)
    assert os.path.exists(run / "run.key")


def test_fewer_rows_on_resume_are_refused(privzoo, tmp_path):
    """N is in the plan: delta and the sampling rate would be others."""
    folder = write_data(tmp_path)
    kill = {"at": "fsync ledger.jsonl", "count": 2, "when": "after"}
    argv = [*SST2, "trainer.accelerator=cpu", "epochs=0.5", f"data_root={folder}", f"output_dir={tmp_path}/runs"]
    assert privzoo(*argv, kill=kill)[0] == -9
    (run,) = (tmp_path / "runs").iterdir()
    write_data(tmp_path, train=[{"sentence": f"a good film number {i}", "label": i % 2} for i in range(30)])
    code, output = privzoo(f"resume={run}")
    assert (code, "num_examples=40" in output) == (2, True), output


@pytest.mark.sweep
def test_another_tokenizer_on_resume_is_another_configuration(privzoo_on_few_rows, tmp_path):
    """The rows are encoded otherwise: draws and noise must be fresh, and the lost release is paid again."""
    import shutil

    from privzoo.models.loading import load

    model = tmp_path / "model"
    loaded = load("tiny_encoder", "sequence_classification", num_labels=2)
    loaded.model.save_pretrained(model)
    loaded.processor.save_pretrained(model)
    kill = {"at": "fsync ledger.jsonl", "count": 2, "when": "after"}
    argv = [*QUICK, "epochs=0.8", f"model.path={model}", f"output_dir={tmp_path}/runs"]
    assert privzoo_on_few_rows(*argv, kill=kill)[0] == -9
    (run,) = (tmp_path / "runs").iterdir()
    table = json.loads((model / "tokenizer.json").read_text())
    words = [word for word in table["model"]["vocab"] if not word.startswith("[")]
    table["model"]["vocab"][words[0]], table["model"]["vocab"][words[1]] = (
        table["model"]["vocab"][words[1]],
        table["model"]["vocab"][words[0]],
    )
    (model / "tokenizer.json").write_text(json.dumps(table))
    code, output = privzoo_on_few_rows(f"resume={run}")
    assert code == 0, output
    entries = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len({entry["digest"] for entry in entries}) == 2
    shutil.rmtree(model)


def test_one_split_under_two_names_is_refused(privzoo, tmp_path):
    folder = write_data(tmp_path)
    argv = [*QUICK, *SST2, f"data_root={folder}", "task.data.splits.validation=train"]
    assert "two names" in refused(privzoo, tmp_path, *argv)
