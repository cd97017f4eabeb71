"""The example of CONTRIBUTING.md: a method of one file and one yaml, outside the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def test_a_method_in_one_file_and_one_yaml(tmp_path):
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    assert [name for name, _ in blocks] == ["dp_sign.py", "method/dp_sign.yaml"]
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = re.search(r"PYTHONPATH=\. python (-m privzoo\.train --config-dir \. method=dp_sign eps=8)", TEXT)
    assert command
    run = subprocess.run(
        [sys.executable, *command[1].split(), "epochs=0.2", "trainer.progress=false"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "toy_text · dp_sign · tiny_encoder" in run.stdout
    assert re.search(r"ε +7\.99\d spent of 8", run.stdout), run.stdout
