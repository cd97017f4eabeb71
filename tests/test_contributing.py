"""The example of CONTRIBUTING.md: a method of one file and one yaml, outside the repository."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def test_a_method_in_one_file_and_one_yaml(privzoo, tmp_path):
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    assert [name for name, _ in blocks] == ["dp_sign.py", "method/dp_sign.yaml"]
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = re.search(r"PYTHONPATH=\. python (-m privzoo\.train --config-dir \. method=dp_sign eps=8)", TEXT)
    assert command
    code, output = privzoo(
        *command[1].split()[2:], "epochs=0.2", "trainer.progress=false", "trainer.accelerator=cpu", folder=str(tmp_path)
    )
    assert code == 0, output
    assert "toy_text · dp_sign · tiny_encoder" in output
    assert re.search(r"ε +7\.99\d spent of 8", output), output
