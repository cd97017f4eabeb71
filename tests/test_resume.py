"""PRIVACY 35: killed at every kind of write and resumed, a run makes the same draws, weights, epsilon and metrics."""

import csv
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

# 8 releases with checkpoints after 3, 6 and 8.
SMALL = [
    "task=toy_text", "method=dp_bitfit", "eps=8", "batch_size=100", "microbatch_size=50", "epochs=0.8",
    "trainer.checkpoint_every=3", "trainer.validate_every=4", "trainer.progress=false", "trainer.accelerator=cpu",
]  # fmt: skip
SEEDED = [*SMALL, "privacy.noise_seed=7"]


@pytest.fixture(scope="module")
def privzoo(privzoo_on_few_rows):
    return privzoo_on_few_rows


def only_run(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return run


def ledger_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def draws_in(file: Path) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for line in file.read_text().splitlines():
        release, drawn = json.loads(line)
        found.setdefault(release, []).append(drawn)
    return found


def curves_of(run: Path) -> list[dict]:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k != "examples_per_s"} for row in rows]


def result_of(run: Path) -> dict:
    varying = ("wall_s", "examples_per_s", "peak_memory_bytes", "created", "resumes", "git_commit")
    return {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in varying}


@pytest.fixture(scope="module")
def straight(privzoo, tmp_path_factory):
    """The run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    code, output = privzoo(*SEEDED, f"output_dir={folder}", draws=str(folder.parent / "straight.draws"))
    assert code == 0, output
    return only_run(folder), draws_in(folder.parent / "straight.draws")


# Every kind of write; the second list holds its other sides and later times.
KILLS = [
    ("torn ledger.jsonl", 5, "before"),
    ("fsync ledger.jsonl", 5, "after"),
    ("fsync .last.ckpt.tmp", 1, "before"),
    ("replace last.ckpt", 2, "before"),
    ("replace result.json", 2, "after"),
    ("replace privacy.json", 1, "before"),
    ("rename model", 1, "before"),
    ("unlink run.key", 1, "before"),
]
MORE_KILLS = [
    ("fsync ledger.jsonl", 1, "before"),
    ("fsync ledger.jsonl", 8, "after"),
    ("replace last.ckpt", 2, "after"),
    ("replace last.ckpt", 3, "after"),
    ("replace result.json", 1, "before"),
    ("replace result.json", 2, "before"),
]


def named(kills: list[tuple], *marks) -> list:
    return [pytest.param(*kill, id=" ".join(map(str, kill)), marks=marks) for kill in kills]


@pytest.mark.parametrize(("at", "count", "when"), [*named(KILLS), *named(MORE_KILLS, pytest.mark.sweep)])
def test_a_killed_run_goes_on_to_the_same_end(privzoo, straight, tmp_path, at, count, when):
    expected, expected_draws = straight
    draws = tmp_path / "draws"
    kill = {"at": at, "count": count, "when": when}
    code, output = privzoo(*SEEDED, f"output_dir={tmp_path}/runs", kill=kill, draws=str(draws))
    assert code == -signal.SIGKILL, f"the kill never came: {output}"
    run = only_run(tmp_path / "runs")

    code, output = privzoo(f"resume={run}", draws=str(draws))
    assert code == 0, output

    made = draws_in(draws)
    assert {r: d[0] for r, d in made.items()} == {r: d[0] for r, d in expected_draws.items()}
    assert all(drawn == again[0] for again in made.values() for drawn in again), "a release was drawn in two ways"
    assert ledger_of(run) == ledger_of(expected)
    assert (run / "model" / "model.safetensors").read_bytes() == (expected / "model" / "model.safetensors").read_bytes()
    assert curves_of(run) == curves_of(expected)
    assert result_of(run) == result_of(expected)
    assert not (run / "run.key").exists()


# Two phases of 4 releases each, with a checkpoint in the first, at the boundary, and in the second.
TWO_PHASES = [
    *(item for item in SEEDED if not item.startswith(("method", "trainer.checkpoint", "trainer.validate"))),
    "method=dp_bitfit_two_phase", "method.phases=[{epochs: 0.4, trainable: all, lr: 1e-3},{trainable: biases}]",
    "trainer.checkpoint_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def two_phases(privzoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_phases")
    code, output = privzoo(*TWO_PHASES, f"output_dir={folder}")
    assert code == 0, output
    return only_run(folder)


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(("fsync ledger.jsonl", 4, "after"), id="before the boundary", marks=pytest.mark.sweep),
        pytest.param(("replace last.ckpt", 2, "after"), id="at the boundary", marks=pytest.mark.sweep),
        pytest.param(("fsync ledger.jsonl", 5, "after"), id="behind the boundary", marks=pytest.mark.sweep),
        pytest.param(("fsync ledger.jsonl", 7, "after"), id="within the second phase"),
    ],
)
def test_two_phases_are_one_account_on_both_sides_of_the_boundary(privzoo, two_phases, tmp_path, kill):
    at, count, when = kill
    code, output = privzoo(*TWO_PHASES, f"output_dir={tmp_path}/runs", kill={"at": at, "count": count, "when": when})
    assert code == -signal.SIGKILL, f"the kill never came: {output}"
    run = only_run(tmp_path / "runs")
    code, output = privzoo(f"resume={run}")
    assert code == 0, output
    assert ledger_of(run) == ledger_of(two_phases)
    assert [entry["release"] for entry in ledger_of(run)] == list(range(8))
    assert (run / "model" / "model.safetensors").read_bytes() == (two_phases / "model" / "model.safetensors").read_bytes()
    assert curves_of(run) == curves_of(two_phases)
    assert result_of(run) == result_of(two_phases)


def test_draws_differ_between_releases(straight):
    _, draws = straight
    assert sorted(draws) == list(range(8))
    assert len({tuple(drawn[0]) for drawn in draws.values()}) == 8


def test_a_private_run_killed_between_checkpoints_pays_once(privzoo, tmp_path):
    """With a key from the operating system: the same draws again, no release paid twice, key gone at the end."""
    draws = tmp_path / "draws"
    kill = {"at": "fsync ledger.jsonl", "count": 6, "when": "after"}
    code, _ = privzoo(*SMALL, f"output_dir={tmp_path}/runs", kill=kill, draws=str(draws))
    assert code == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    assert (run / "run.key").stat().st_mode & 0o777 == 0o600
    assert privzoo(f"resume={run}", draws=str(draws))[0] == 0
    assert all(drawn == again[0] for again in draws_in(draws).values() for drawn in again)
    assert [entry["release"] for entry in ledger_of(run)] == list(range(8))
    record = json.loads((run / "result.json").read_text())
    assert record["private"] is True
    assert 0.99 * 8 <= record["epsilon_spent"] <= 8
    assert not (run / "run.key").exists()


def test_another_lr_on_resume_takes_fresh_streams_and_pays_again(privzoo, tmp_path):
    """Two releases were lost; under another digest they are made anew, so two fewer can be afforded at the end."""
    draws = tmp_path / "draws"
    kill = {"at": "fsync ledger.jsonl", "count": 5, "when": "after"}
    assert privzoo(*SMALL, f"output_dir={tmp_path}/runs", kill=kill, draws=str(draws))[0] == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    code, output = privzoo(f"resume={run}", "lr=1e-3", draws=str(draws))
    assert code == 0, output
    assert all(float(row["lr"]) <= 1e-3 for row in curves_of(run) if int(row["step"]) > 3), "the old lr went on"
    entries = ledger_of(run)
    assert [entry["release"] for entry in entries] == [0, 1, 2, 3, 4, 3, 4, 5]
    assert len({entry["digest"] for entry in entries}) == 2
    made = draws_in(draws)
    assert all(first != second for first, second in (made[3], made[4])), "an old draw was used for another sum"
    record = json.loads((run / "result.json").read_text())
    assert (record["state"], record["steps"]) == ("stopped_at_epsilon", 6)
    assert record["epsilon_spent"] <= 8


@pytest.mark.parametrize("override", ["eps=10", "batch_size=500", "clip_norm=1", "seed=1", "method=dp_full", "delta=1e-6"])
def test_a_resume_that_breaks_the_promise_is_refused(privzoo, straight, override):
    run, _ = straight
    code, output = privzoo(f"resume={run}", override)
    assert code == 2
    assert "a resumed run keeps its promise" in output


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(SMALL, id="another private run"),
        pytest.param([*SMALL, "eps=inf"], id="the non-private twin", marks=pytest.mark.sweep),
    ],
)
def test_a_checkpoint_from_elsewhere_is_refused(privzoo, tmp_path, other):
    """What it holds was not paid for here; the run's own checkpoint still goes on, to the same digest."""
    kill = {"at": "fsync ledger.jsonl", "count": 5, "when": "after"}
    runs = []
    for name, argv in (("a", SMALL), ("b", other)):
        assert privzoo(*argv, f"output_dir={tmp_path}/{name}", kill=kill)[0] == -signal.SIGKILL
        runs.append(only_run(tmp_path / name))
    own = (runs[0] / "last.ckpt").read_bytes()
    (runs[0] / "last.ckpt").write_bytes((runs[1] / "last.ckpt").read_bytes())
    code, output = privzoo(f"resume={runs[0]}")
    assert (code, "was not made by this run" in output) == (2, True), output
    (runs[0] / "last.ckpt").write_bytes(own)
    assert privzoo(f"resume={runs[0]}")[0] == 0
    assert [entry["release"] for entry in ledger_of(runs[0])] == list(range(8))


def interrupted(privzoo, tmp_path, number: int) -> tuple[int, str]:
    """Start a run, send it a signal when its third release is in the ledger, and wait for its end."""
    started = tmp_path / "pid"

    def send() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            ledgers = list(tmp_path.glob("runs/*/ledger.jsonl"))
            if started.exists() and ledgers and ledgers[0].read_bytes().count(b"\n") >= 3:
                os.kill(int(started.read_text()), number)
                return
            time.sleep(0.01)

    sender = threading.Thread(target=send)
    sender.start()
    slow = [item for item in SEEDED if not item.startswith("microbatch")]
    answer = privzoo(*slow, "microbatch_size=8", f"output_dir={tmp_path}/runs", started=str(started))
    sender.join()
    return answer


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.sweep)]
)
def test_ctrl_c_and_sigterm_end_with_a_checkpoint(privzoo, tmp_path, number, expected):
    code, output = interrupted(privzoo, tmp_path, number)
    assert code == expected, output
    run = only_run(tmp_path / "runs")
    assert f"resume={run}" in output
    assert "Traceback" not in output
    record = json.loads((run / "result.json").read_text())
    assert record["state"] == "interrupted"
    made = record["steps"]
    assert 2 <= made < 8
    code, output = privzoo(f"resume={run}")
    assert code == 0, output
    entries = ledger_of(run)
    assert [entry["release"] for entry in entries] == list(range(8))
    assert len({entry["digest"] for entry in entries}) == 1
    assert json.loads((run / "result.json").read_text())["state"] == "finished"


def test_a_finished_run_is_not_made_again(privzoo, straight):
    run, _ = straight
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for command in ([*SEEDED, f"output_dir={run.parent}"], [f"resume={run}"]):
        code, output = privzoo(*command)
        assert code == 0
        assert "is finished already" in output
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.fixture(scope="module")
def killed_once(privzoo, tmp_path_factory):
    """The folder that holds a run which was killed behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    kill = {"at": "fsync ledger.jsonl", "count": 5, "when": "after"}
    assert privzoo(*SEEDED, f"output_dir={folder}", kill=kill)[0] == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of it to damage."""
    return only_run(Path(shutil.copytree(killed_once, tmp_path / "runs")))


def test_an_unfinished_run_is_not_started_again(privzoo, killed):
    run = killed
    code, output = privzoo(*SEEDED, f"output_dir={run.parent}")
    assert code == 2
    assert f"resume={run}" in output


def test_damaged_parts_of_a_run_folder(privzoo, killed):
    """A ledger cut by a line or edited, a checkpoint cut short, a missing key: one sentence, nothing goes on."""
    run = killed

    def refused(file: str, content: bytes | None) -> str:
        kept = (run / file).read_bytes()
        (run / file).unlink()
        if content is not None:
            (run / file).write_bytes(content)
        code, output = privzoo(f"resume={run}")
        (run / file).write_bytes(kept)
        assert code == 2, output
        assert "Traceback" not in output
        assert len(output.strip().splitlines()) == 1
        return output

    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert "lacks 1 of the 3 releases" in refused("ledger.jsonl", b"".join(lines[:2]))
    assert "edited at line 2" in refused("ledger.jsonl", b"".join([lines[0], *lines[2:]]))
    assert "edited at line 1" in refused(
        "ledger.jsonl", b"".join(lines).replace(b'"noise_multiplier": 0', b'"noise_multiplier": 9', 1)
    )
    assert "damaged at line 2" in refused("ledger.jsonl", lines[0] + b"{nonsense}\n" + lines[1])
    checkpoint = (run / "last.ckpt").read_bytes()
    assert "damaged or cut short" in refused("last.ckpt", checkpoint[: len(checkpoint) // 2])
    assert "damaged or cut short" in refused("last.ckpt", b"")
    assert "without its key" in refused("run.key", None)
    assert "expected 32" in refused("run.key", b"short")
    assert privzoo(f"resume={run}")[0] == 0


def test_an_edited_configuration_is_refused(privzoo, killed):
    """Another epsilon, or no test seed any more, written into the folder: the promise that was made counts."""
    run = killed
    kept = (run / "config.yaml").read_text()
    for old, new in (("eps: 8", "eps: 100"), ("noise_seed: 7", "noise_seed: null"), ("clip_norm: 0.1", "clip_norm: 0.2")):
        assert old in kept
        (run / "config.yaml").write_text(kept.replace(old, new))
        code, output = privzoo(f"resume={run}")
        assert (code, "config.yaml was edited" in output) == (2, True), output


def test_a_key_from_elsewhere_is_refused(privzoo, killed):
    """Another key would make other draws for releases that were paid already."""
    run = killed
    (run / "run.key").write_bytes(os.urandom(32))
    code, output = privzoo(f"resume={run}")
    assert (code, "was not made by this run" in output) == (2, True), output


def test_the_ledger_tells_nothing_about_the_data(privzoo, tmp_path):
    """Two runs on the same data have unrelated digests: a guess at the data cannot be checked against a ledger."""
    kill = {"at": "fsync ledger.jsonl", "count": 1, "when": "after"}
    for name in ("a", "b"):
        assert privzoo(*SMALL, f"output_dir={tmp_path}/{name}", kill=kill)[0] == -signal.SIGKILL
    digests = [{entry["digest"] for entry in ledger_of(only_run(tmp_path / name))} for name in ("a", "b")]
    assert not digests[0] & digests[1]
