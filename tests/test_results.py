import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from privzoo import results
from privzoo.errors import RunLost, UserError
from privzoo.results import RunRecord, read_record, write_json, write_record


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
        "epsilon_spent": 7.96,
        "delta": 6e-5,
        "noise_multiplier": 0.5397,
        "clip_norm": 0.1,
        "sample_rate": 0.05,
        "batch_size": 400,
        "num_examples": 8000,
        "headline": "accuracy",
        "higher_is_better": True,
        "metrics": {"accuracy": 0.875, "loss": 0.3},
        "untrained": {"accuracy": 0.25},
        "steps": 60,
        "steps_planned": 60,
        "devices": 1,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "group_id": "99ff",
        "lr": 5e-4,
        "examples_per_s": 1200.0,
        "peak_memory_bytes": 700 * 2**20,
        "wall_s": 61.0,
    }
    return RunRecord(**(values | changes))


def test_the_file_is_one_flat_object_with_the_documented_keys(tmp_path):
    write_record(tmp_path, record())
    flat = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert all(not isinstance(value, dict | list) for value in flat.values())
    assert flat["metric/accuracy"] == 0.875
    assert flat["metric/loss"] == 0.3
    assert flat["untrained/accuracy"] == 0.25
    assert flat["version/torch"] == "2.13.0"
    assert flat["epsilon_target"] == 8.0
    documented = RunRecord.__doc__.split("Keys of result.json:")[1]
    for f in fields(RunRecord):
        name = {"metrics": "metric/<name>", "untrained": "untrained/<name>", "versions": "version/<package>"}
        assert re.search(rf"(?<![\w/]){re.escape(name.get(f.name, f.name))}(?!\w)", documented), f.name


@pytest.mark.parametrize("changes", [{}, {"metrics": {}, "untrained": {}}, {"group_id": None, "note": "ümlaut; ε"}])
def test_read_gives_back_what_was_written(tmp_path, changes):
    write_record(tmp_path, record(**changes))
    assert read_record(tmp_path) == record(**changes)
    assert read_record(str(tmp_path)) == record(**changes)


def test_infinite_epsilon_and_clip_norm_become_null(tmp_path):
    inf = math.inf
    baseline = record(private=False, epsilon_target=inf, epsilon_spent=inf, clip_norm=inf, noise_multiplier=0.0)
    write_record(tmp_path, baseline)
    flat = json.loads((tmp_path / "result.json").read_text())
    assert flat["epsilon_target"] is None
    assert flat["epsilon_spent"] is None
    assert flat["clip_norm"] is None
    assert flat["private"] is False
    assert read_record(tmp_path) == baseline


def test_a_metric_that_is_not_finite_becomes_null_and_is_told(tmp_path):
    diverged = record(metrics={"accuracy": 0.5, "loss": math.nan}, untrained={"accuracy": math.inf}, note="seen")
    assert diverged.metrics == {"accuracy": 0.5, "loss": None}
    assert diverged.untrained == {"accuracy": None}
    assert diverged.note == "seen; metric/loss was nan; untrained/accuracy was inf"
    write_record(tmp_path, diverged)
    assert not re.search("nan|infinity", re.sub(r'"note".*', "", (tmp_path / "result.json").read_text()), re.IGNORECASE)
    assert read_record(tmp_path) == diverged
    assert replace(diverged, steps=1).note == diverged.note  # a copy does not tell it twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "done"}, "state='done'"),
        ({"epsilon_target": None}, "private run"),
        ({"epsilon_spent": math.inf}, "private run"),
        ({"delta": None}, "private run"),
        ({"not_private_reason": "privacy.noise_seed was set"}, "private=false"),
        ({"private": False}, "reason why"),
        ({"headline": "f1"}, "headline='f1'"),
        ({"untrained": {"private/loss": 1.0}}, "private/"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        record(**changes)


def test_write_json_refuses_nan_and_keeps_the_former_content(tmp_path):
    path = tmp_path / "card.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]


def test_write_json_syncs_the_content_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    sync, swap = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), swap(a, b))[1])
    write_json(tmp_path / "card.json", {"a": 1})
    assert calls[1:] == ["rename", str(tmp_path)]
    assert Path(calls[0]).parent == tmp_path  # the temporary file lies on the same disk
    assert Path(calls[0]).name != "card.json"


_LIMITED = """
import resource, sys
from pathlib import Path
from privzoo.errors import RunLost
from privzoo.results import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(Path(sys.argv[1]), {"a": "x" * 20000})
except RunLost as lost:
    print(lost)
else:
    print("no error")
"""


@pytest.mark.parametrize("former", [True, False])
def test_a_refused_write_leaves_the_former_content_and_nothing_else(tmp_path, former):
    path = tmp_path / "result.json"
    if former:
        write_json(path, {"a": 1})
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert "Could not write" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == (["result.json"] if former else [])
    if former:
        assert json.loads(path.read_text()) == {"a": 1}


def test_a_full_disk_leaves_the_former_content(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        write_json(disk / "result.json", {"a": 1})
        with pytest.raises(RunLost, match="No space left on device"):
            write_json(disk / "result.json", {"a": "x" * 100_000})
        assert json.loads((disk / "result.json").read_text()) == {"a": 1}
        assert [p.name for p in disk.iterdir()] == ["result.json"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_not_a_run_folder_is_told_in_one_sentence(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("x")
    for folder, words in [
        (tmp_path / "absent", "There is no folder"),
        (tmp_path / "file", "is a file"),
        (empty, "is not a run folder"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            read_record(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_cut_of_the_file_is_told_in_one_sentence(tmp_path):
    write_record(tmp_path, record(note="ε"))
    path = tmp_path / "result.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2):  # the last two bytes are "}" and the line's end
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or cut short") as caught:
            read_record(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda flat: [flat], "one json object"),
        (lambda flat: {}, "schema_version"),
        (lambda flat: flat | {"schema_version": 99}, "schema_version=99, expected 1"),
        (lambda flat: {k: v for k, v in flat.items() if k != "steps"}, "steps"),
        (lambda flat: flat | {"surprise": 1}, "surprise"),
        (lambda flat: flat | {"state": "resting"}, "resting"),
    ],
)
def test_an_object_that_is_no_record_is_told_in_one_sentence(tmp_path, edit, words):
    (tmp_path / "result.json").write_text(json.dumps(edit(record().to_json())))
    with pytest.raises(UserError, match=words):
        read_record(tmp_path)


def test_run_folders_finds_nested_ones_and_the_folder_itself(tmp_path):
    for name in ("b", "a/deep"):
        (tmp_path / name).mkdir(parents=True)
        write_record(tmp_path / name, record())
    (tmp_path / "c").mkdir()
    assert results.run_folders(tmp_path) == [tmp_path / "a/deep", tmp_path / "b"]
    assert results.run_folders(tmp_path / "b") == [tmp_path / "b"]


def _git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_commit_is_that_of_the_checkout_which_tracks_the_file(tmp_path, monkeypatch):
    source = tmp_path / "results.py"
    source.write_text("1")
    assert results.git_commit(source) is None  # no checkout
    _git(tmp_path, "init", "-q")
    assert results.git_commit(source) is None  # a checkout without the file
    _git(tmp_path, "add", "results.py")
    assert results.git_commit(source) is None  # no commit yet
    _git(tmp_path, "commit", "-qm", "x")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert results.git_commit(source) == head
    installed = tmp_path / ".venv"
    installed.mkdir()
    (installed / "results.py").write_text("1")
    assert results.git_commit(installed / "results.py") is None  # installed inside somebody else's checkout
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert results.git_commit(source) == head
    source.write_text("2")
    assert results.git_commit(source) == head + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.git_commit(source) is None  # git itself is missing


def test_versions_and_memory():
    assert results.versions()["python"].split(".")[0] == str(sys.version_info.major)
    assert "torch" in results.versions()
    assert results.peak_memory_bytes(12) == 12
    assert 2**23 < results.peak_memory_bytes() < 2**40  # bytes, not KiB: an interpreter alone takes some 10 MiB


def test_results_does_not_import_torch():
    code = "import sys, privzoo.results; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
