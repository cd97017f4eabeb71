"""slurm/ranks.sbatch on a real SLURM; run where one answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("replicas", "dp_bitfit"),
        ("fsdp", "dp_full"),
        ("fsdp", "dp_lora"),
        ("zero1", "dp_bitfit"),
        ("zero2", "dp_full"),
        ("zero3", "dp_full"),
        ("zero3", "dp_lora"),
    ],
)
def test_two_tasks_are_one_run(strategy, method, tmp_path):
    """srun starts both processes, which find one another by what it tells them."""
    script = str(REPOSITORY / "slurm" / "ranks.sbatch")
    command = [
        "sbatch", "--wait", f"--chdir={tmp_path}", script, "task=toy_text", f"method={method}", "eps=8", "epochs=0.1",
        "trainer.accelerator=cpu", f"trainer.strategy={strategy}", f"output_dir={tmp_path}/runs",
    ]  # fmt: skip
    ended = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=600
    )
    (log,) = tmp_path.glob("slurm-*.log")
    assert ended.returncode == 0, ended.stderr + log.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    record = json.loads((folder / "result.json").read_text())
    assert (record["state"], record["devices"]) == ("finished", 2)
    assert log.read_text().count("2 × cpu") == 1
