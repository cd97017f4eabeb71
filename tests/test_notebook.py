"""`privzoo.finetune`: the command line's run from Python, on the same configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import privzoo
from privzoo.errors import UserError

SMALL = {"trainer.accelerator": "cpu", "trainer.progress": False}


def test_the_same_run_as_the_commands(tmp_path, run_config):
    made = privzoo.finetune("toy_text", "dp_head", 8, SMALL, epochs=0.02, output_dir=str(tmp_path / "runs"))
    assert made.record.state == "finished"
    assert made.record.epsilon_spent <= 8
    assert json.loads((made.folder / "result.json").read_text())["run_id"] == made.record.run_id
    with torch.no_grad():
        ids = made.processor("a good film", return_tensors="pt")
        assert made.model(**ids).logits.shape == (1, 2)
    from privzoo.config import run_id

    cfg = run_config("task=toy_text", "method=dp_head", "eps=8", "epochs=0.02", "trainer.accelerator=cpu")
    assert run_id(cfg) == made.record.run_id, "the configuration is the command line's"
    again = privzoo.finetune("toy_text", "dp_head", 8, SMALL, epochs=0.02, output_dir=str(tmp_path / "runs"))
    assert again.record == made.record, "a finished run is not done again"


@pytest.mark.parametrize(
    ("overrides", "values", "message"),
    [
        ({"task.max_lenght": 3}, {}, "Unknown key 'task.max_lenght'"),
        ({}, {"epsilon": 3}, "Unknown key 'epsilon'"),
        ({}, {"batch_size": 0}, "batch_size=0"),
        ({"data.path": "no.jsonl"}, {}, "data.path"),
        ({"+method.no_such": 1}, {}, "has no argument 'no_such'"),
        ({"data.path": Path("no.jsonl")}, {"lr": np.float64(1e-3)}, "data.path"),
        ({}, {"resume": "runs/x"}, "no resume= here"),
        ({}, {"model": "gpt3"}, "model 'gpt3' does not exist"),
    ],
)
def test_mistakes_are_user_errors(overrides, values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        privzoo.finetune("toy_text", "dp_head", 8, overrides, output_dir=str(tmp_path), **values)
    assert not list(tmp_path.iterdir())


def test_nothing_else_is_there():
    with pytest.raises(AttributeError, match="has no attribute 'train_all'"):
        _ = privzoo.train_all
