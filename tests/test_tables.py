"""`python -m privzoo.tables`: kept records become tables, on the screen and as Markdown."""

import os
from pathlib import Path

import pytest

from privzoo.errors import UserError
from privzoo.reporting.display import runs_table
from privzoo.reporting.markdown import markdown
from privzoo.results import RunRecord, write_record
from privzoo.tables import tables

KEPT = Path(__file__).resolve().parents[1] / "paper_tables"


def record(method: str, accuracy: float, **changes) -> RunRecord:
    values = {
        "run_id": "1a2b3c4d", "run_folder": f"sst2-{method}", "created": "2026-01-02T03:04:05+00:00", "state": "finished",
        "task": "sst2", "method": method, "model": "minilm", "seed": 0, "private": True, "not_private_reason": None,
        "epsilon_target": 8.0, "epsilon_spent": 7.96, "delta": 1e-5, "noise_multiplier": 0.54, "clip_norm": 0.1,
        "sample_rate": 0.015, "batch_size": 1000, "num_examples": 67349, "headline": "accuracy", "higher_is_better": True,
        "metrics": {"accuracy": accuracy}, "untrained": {"accuracy": 0.5}, "steps": 203, "steps_planned": 203,
        "devices": 1, "device": "cpu", "examples_per_s": 50.0, "peak_memory_bytes": 2**30, "wall_s": 3600.0,
    }  # fmt: skip
    return RunRecord(**(values | changes))


def keep(folder: Path, *records: RunRecord) -> None:
    for number, kept in enumerate(records):
        (folder / str(number)).mkdir(parents=True)
        write_record(folder / str(number), kept)


def test_each_folder_of_records_becomes_a_table_on_the_screen_and_a_file(tmp_path, capsys):
    keep(tmp_path / "glue", record("dp_full", 0.843), record("dp_bitfit", 0.822))
    keep(tmp_path / "other", record("dp_lora", 0.8))
    (tmp_path / "published").mkdir()  # holds no record: no table
    assert tables(tmp_path) == [tmp_path / "glue.md", tmp_path / "other.md"]
    lines = (tmp_path / "glue.md").read_text().splitlines()
    assert lines[0].startswith("task sst2 · model minilm · δ 1e-5")
    assert lines[2] == "| method | ε target | ε spent | σ | accuracy | untrained | steps | time | memory |"
    assert lines[3] == "|---" + "|---:" * 8 + "|"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [(row[0], row[4], row[-1]) for row in rows] == [
        ("dp_bitfit", "0.822", "1.0 GiB"),
        ("dp_full", "0.843", "1.0 GiB"),
    ]
    assert "dp_full" in capsys.readouterr().out


def test_the_same_records_give_the_same_bytes(tmp_path):
    keep(tmp_path / "glue", record("dp_full", 0.843), record("dp_bitfit", 0.822))
    (path,) = tables(tmp_path)
    before = path.read_bytes()
    tables(tmp_path)
    assert path.read_bytes() == before


def test_a_marked_run_is_marked_in_the_file_too(tmp_path):
    keep(tmp_path / "glue", record("dp_full", 0.9, private=False, not_private_reason="privacy.noise_seed was set"))
    text = tables(tmp_path)[0].read_text()
    assert "NOT PRIVATE: privacy.noise_seed was set" in text.splitlines()
    assert "7.96" not in text


def test_a_damaged_record_is_refused_and_no_file_is_touched(tmp_path):
    keep(tmp_path / "a", record("dp_full", 0.9))
    keep(tmp_path / "b", record("dp_full", 0.9))
    (tmp_path / "b" / "0" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json"):
        tables(tmp_path)
    assert not list(tmp_path.glob("*.md"))


def test_names_with_points_are_tables_of_their_own(tmp_path):
    for name in ("glue_v1.0", "glue_v1.1"):
        keep(tmp_path / name, record("dp_full", 0.9))
    assert [path.name for path in tables(tmp_path)] == ["glue_v1.0.md", "glue_v1.1.md"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize(("place", "mode"), [(".", 0o000), ("glue", 0o000), ("glue/0", 0o000), (".", 0o555)])
def test_what_may_not_be_read_or_written_is_one_sentence(place, mode, tmp_path):
    keep(tmp_path / "glue", record("dp_full", 0.9))
    (tmp_path / place).chmod(mode)
    try:
        with pytest.raises(UserError, match=r"cannot be read|cannot be written"):
            tables(tmp_path)
    finally:
        (tmp_path / place).chmod(0o755)
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_records_is_one_sentence(name, tmp_path, privzoo):
    (tmp_path / "empty").mkdir()
    code, output = privzoo(f"folder={tmp_path / name}", module="privzoo.tables")
    assert code == 2
    assert output.startswith("privzoo: ")
    assert output.count("\n") == 1


def test_a_bar_in_a_cell_does_not_end_it(tmp_path):
    keep(tmp_path / "glue", record("a|b", 0.9))
    assert "| a\\|b |" in markdown(runs_table([tmp_path / "glue" / "0"]))


def test_the_tables_of_the_project_are_what_its_records_say():
    folders = [place for place in KEPT.iterdir() if place.is_dir()]
    assert folders
    for folder in folders:
        runs = [path.parent for path in sorted(folder.rglob("result.json"))]
        assert runs, folder
        assert folder.with_suffix(".md").read_text() == markdown(runs_table(runs, strict=True))
