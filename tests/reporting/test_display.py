import math
import re
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from privzoo.reporting.display import final_table, main, print_table, runs_table
from privzoo.results import RunRecord, write_record


def record(**changes) -> RunRecord:
    values = {
        "run_id": "1a2b3c4d",
        "run_folder": "toy_text-dp_bitfit-eps8-s0-1a2b3c4d",
        "created": "2026-01-02T03:04:05+00:00",
        "state": "finished",
        "task": "toy_text",
        "method": "dp_bitfit",
        "model": "tiny_encoder",
        "seed": 0,
        "private": True,
        "not_private_reason": None,
        "epsilon_target": 8.0,
        "epsilon_spent": 7.9612,
        "delta": 6e-5,
        "noise_multiplier": 0.53971,
        "clip_norm": 0.1,
        "sample_rate": 0.05,
        "batch_size": 400,
        "num_examples": 8000,
        "headline": "accuracy",
        "higher_is_better": True,
        "metrics": {"loss": 0.3, "accuracy": 0.87512},
        "untrained": {"accuracy": 0.2512},
        "steps": 60,
        "steps_planned": 60,
        "devices": 1,
        "device": "cpu",
        "examples_per_s": 1200.0,
        "peak_memory_bytes": 700 * 2**20,
        "wall_s": 61.0,
    }
    return RunRecord(**(values | changes))


INF = {
    "private": False, "epsilon_target": math.inf, "epsilon_spent": math.inf, "noise_multiplier": 0.0,
    "clip_norm": math.inf,
}  # fmt: skip
MARKED = {"private": False, "not_private_reason": "privacy.noise_seed was set"}


@pytest.fixture
def runs(tmp_path):
    """Writes records into folders of their own; returns the folders."""

    def write(*records):
        folders = [tmp_path / "runs" / str(number) for number in range(len(records))]
        for folder, r in zip(folders, records, strict=True):
            folder.mkdir(parents=True)
            write_record(folder, r)
        return folders

    return write


def rendered(table, width=100, colour=False):
    console = Console(
        file=StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None, _environ={}
    )
    console.print(table)
    return console.file.getvalue()


def cells(text):
    """The rows below the rule, split at white space."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    return [line.split() for line in lines[rule + 1 :] if line.strip()]


# ---- one run


def test_the_final_table_says_everything_of_a_run():
    text = rendered(final_table(record(), "outputs/somewhere"))
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines()[1:] if line.strip())
    assert text.splitlines()[0].strip() == "toy_text · dp_bitfit · tiny_encoder · seed 0"
    assert list(rows)[:2] == ["accuracy", "loss"]  # the headline first
    assert rows["accuracy"] == "0.8751  (untrained 0.2512, higher is better)"
    assert rows["loss"] == "0.3"
    assert rows["ε"] == "7.961 spent of 8"
    assert rows["δ"] == "6e-5  (N = 8,000, δ·N = 0.48)"
    assert rows["σ"] == "0.5397  (clip norm 0.1)"
    assert rows["steps"] == "60  (batch 400, q = 0.05)"
    assert rows["time"] == "1m01s  (1,200 examples/s)"
    assert rows["memory"] == "700 MiB peak  (1 × cpu)"
    assert rows["run"] == "outputs/somewhere"
    assert "state" not in rows
    assert "NOT PRIVATE" not in text


def test_the_final_table_of_a_broken_off_run_says_what_is_missing():
    text = rendered(final_table(record(state="stopped_at_epsilon", steps=31, metrics={}, note="data were edited")))
    assert re.search(r"accuracy +–", text)
    assert "31 of 60" in text
    assert re.search(r"state +stopped at epsilon", text)
    assert re.search(r"note +data were edited", text)


@pytest.mark.parametrize("make", [final_table, None])
def test_not_private_is_said_in_words_and_in_red(runs, make):
    table = final_table(record(**MARKED)) if make else runs_table(runs(record(**MARKED)))
    plain, coloured = rendered(table), rendered(table, colour=True)
    assert "NOT PRIVATE: privacy.noise_seed was set" in plain
    assert "\x1b" not in plain
    assert re.search(r"\x1b\[1;31m *NOT", coloured)


def test_a_marked_run_shows_no_epsilon_as_if_it_were_spent(runs):
    text = rendered(runs_table(runs(record(**MARKED))))
    assert "7.961" not in text


def test_a_baseline_has_infinite_epsilon_and_is_not_accused(runs):
    for text in (rendered(final_table(record(**INF))), rendered(runs_table(runs(record(**INF))))):
        assert "∞" in text
        assert "NOT PRIVATE" not in text


# ---- many runs


def test_rows_are_sorted_by_task_method_and_numeric_epsilon_with_infinity_last(runs):
    def cell(task, method, eps):
        changes = INF if eps == math.inf else {"epsilon_target": eps, "epsilon_spent": eps}
        return record(task=task, method=method, **changes)

    wanted = [("a", "x", 3.0), ("a", "x", 10.0), ("a", "x", math.inf), ("a", "y", 8.0), ("b", "x", 1.0)]
    rows = cells(rendered(runs_table(runs(*(cell(*w) for w in reversed(wanted))))))
    assert [row[:3] for row in rows] == [
        ["a", "x", "3"], ["a", "x", "10"], ["a", "x", "∞"], ["a", "y", "8"], ["b", "x", "1"],
    ]  # fmt: skip


def test_what_all_rows_share_is_said_once(runs):
    text = rendered(runs_table(runs(record(), record(**INF))))
    shared = "task toy_text · model tiny_encoder · δ 6e-5 · N 8,000 · δ·N 0.48 · finished"
    assert " ".join(text.split()).startswith(shared)
    assert text.count("tiny_encoder") == 1
    assert cells(text) == [
        ["dp_bitfit", "8", "7.961", "0.5397", "0.8751", "0.2512", "60", "1m01s", "700", "MiB"],
        ["dp_bitfit", "∞", "∞", "0", "0.8751", "0.2512", "60", "1m01s", "700", "MiB"],
    ]


def test_what_differs_is_said_in_every_row_and_fits_100_columns_uncut(runs):
    mixed = [
        record(),
        record(task="sst2", method="dp_full", model="../weights/minilm", delta=1e-5, peak_memory_bytes=3 * 2**30),
        record(task="toy_lm", method="dp_lora", model="tiny_lm", headline="perplexity", higher_is_better=False,
               metrics={"perplexity": 12.345}, untrained={"perplexity": 1503.2}, state="interrupted", steps=31),
        record(epsilon_target=3.0, **MARKED),
    ]  # fmt: skip
    text = rendered(runs_table(runs(*mixed)))
    for whole in (
        "toy_text", "dp_bitfit", "tiny_encoder", "minilm", "toy_lm", "perplexity", "12.35", "1503", "31/60", "0.8751",
        "interrupted", "finished", "1e-5", "6e-5", "0.5397", "700 MiB", "3.0 GiB", "1m01s", "7.961", "PRIVATE",
    ):  # fmt: skip
        assert re.search(rf"(?<!\S){re.escape(whole)}(?!\S)", text), whole
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def seeds(*scores, **changes):
    return [record(seed=i, group_id="g", metrics={"accuracy": a}, **changes) for i, a in enumerate(scores)]


def test_seeds_of_one_cell_share_a_row_with_mean_deviation_and_count(runs):
    text = rendered(runs_table(runs(*seeds(0.871, 0.880, 0.8655), record(epsilon_target=9.0, group_id="h"))))
    rows = cells(text)
    assert len(rows) == 2
    assert "0.872±0.007" in rows[0]  # mean 0.87217, sample deviation 0.00732 (the population's would be 0.006)
    assert rows[0][rows[0].index("0.872±0.007") + 2] == "3"
    assert re.search(r"\bruns\b", text)
    assert "0.8751" in rows[1]


@pytest.mark.parametrize(
    "other",
    [
        {"group_id": "h", "seed": 1},  # another configuration
        {"group_id": "g", "seed": 0},  # the same seed: no independent run
        {"group_id": "g", "seed": 1, "state": "interrupted"},
        {"group_id": "g", "seed": 1, **MARKED},
    ],
)
def test_what_is_no_seed_of_the_cell_has_a_row_of_its_own(runs, other):
    rendered_rows = rendered(runs_table(runs(record(group_id="g"), record(**other))))
    assert "±" not in rendered_rows
    assert rendered_rows.count("dp_bitfit") == 2


def test_runs_without_a_group_are_never_averaged(runs):
    text = rendered(runs_table(runs(record(seed=0), record(seed=1))))
    assert "±" not in text
    assert len(cells(text)) == 2


def test_a_shared_row_shows_the_largest_epsilon_and_no_mean_over_missing_metrics(runs):
    three = seeds(0.8, 0.9, 0.7, epsilon_spent=7.0)
    three[1] = record(seed=1, group_id="g", epsilon_spent=7.5, metrics={"accuracy": math.nan})
    [row] = cells(rendered(runs_table(runs(*three))))
    assert row[:3] == ["dp_bitfit", "8", "7.5"]
    assert row[4] == "–"


def test_a_damaged_folder_is_named_below_and_the_others_are_shown(runs):
    good, bad = runs(record(), record(task="other"))
    (bad / "result.json").write_text("{")
    text = rendered(runs_table([good, bad]), width=400)
    assert "Left out: " in text
    assert str(bad) in "".join(text.split())  # a long path may be cut over two lines
    assert "dp_bitfit" in text


# ---- the command


def test_the_command_prints_all_runs_below_a_folder_without_colour_and_uncut(runs, tmp_path):
    runs(record(task="sst2" * 10, **MARKED), record())
    environment = {"PATH": "", "COLUMNS": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "privzoo.reporting.display", str(tmp_path)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert "sst2" * 10 in done.stdout
    assert "NOT PRIVATE: privacy.noise_seed was set" in done.stdout


def test_the_command_tells_what_is_missing_in_one_sentence(tmp_path, capsys):
    for arguments in ([str(tmp_path)], [str(tmp_path / "absent")], [], ["a", "b"]):
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("privzoo: ")
        assert told.err.count("\n") == 1


def test_a_terminal_keeps_its_width(runs):
    console = Console(file=StringIO(), width=60, force_terminal=True, color_system=None, _environ={})
    print_table(runs_table(runs(record(task="sst2" * 10), record())), console)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines())) <= 60


def test_tables_do_not_import_torch():
    code = "import sys, privzoo.reporting.display; print(*(m in sys.modules for m in ('torch', 'lightning')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
