"""PRIVACY 35 for DPZero: killed in mid-release and resumed, it makes the same directions, noise and weights."""

import json
import signal
from pathlib import Path

import pytest

# 8 releases with checkpoints after 3, 6 and 8.
RUN = [
    "task=toy_text", "method=dpzero", "eps=8", "batch_size=100", "microbatch_size=50", "epochs=0.8", "lr=1e-5",
    "clip_norm=1000", "trainer.checkpoint_every=3", "trainer.progress=false", "trainer.accelerator=cpu",
    "privacy.noise_seed=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def privzoo(privzoo_on_few_rows):
    return privzoo_on_few_rows


def only_run(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return run


def end_of(run: Path) -> tuple:
    varying = ("wall_s", "examples_per_s", "peak_memory_bytes", "created", "resumes", "git_commit", "run_folder", "run_id")
    record = {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in varying}
    return record, (run / "ledger.jsonl").read_text(), (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.sweep), "bfloat16"])
def test_a_killed_run_goes_on_to_the_same_end(privzoo, tmp_path, dtype):
    runs = []
    for name, kill in (("straight", None), ("killed", {"at": "fsync ledger.jsonl", "count": 5, "when": "after"})):
        code, output = privzoo(
            *RUN, f"model.dtype={dtype}", f"output_dir={tmp_path}/{name}", **({"kill": kill} if kill else {})
        )
        assert code == (-signal.SIGKILL if kill else 0), output
        runs.append(only_run(tmp_path / name))
    code, output = privzoo(f"resume={runs[1]}")
    assert code == 0, output
    assert end_of(runs[0]) == end_of(runs[1])
