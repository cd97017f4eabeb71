"""How a checkpoint reaches its file; whole or absent: tests/test_resume.py."""

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from lightning.pytorch import Trainer
from privzoo.checkpoints import Straight
trainer = Trainer(plugins=[Straight()], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
held = {"weights": torch.ones(32 << 20)}  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.strategy.checkpoint_io.save_checkpoint(held, sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
assert torch.equal(torch.load(sys.argv[1], weights_only=True)["weights"], held["weights"])
"""


def test_a_checkpoint_takes_no_memory(tmp_path):
    """Lightning's own way takes as much as the checkpoint once more, or twice: with Adam three times the weights."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "last.ckpt")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[-1]) < 32, "MiB"
