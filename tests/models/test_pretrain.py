"""The committed tiny models are small, and making them reads nothing private (tests/test_remade_models.py makes them)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from privzoo import toyworld
from privzoo.models import pretrain

NAMES = ["tiny_encoder", "tiny_lm", "tiny_vit"]
COMMITTED = pretrain.TINY_FOLDER


def test_committed_models_are_small_and_of_float32() -> None:
    files = [path for path in COMMITTED.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 2 * 2**20
    for path in COMMITTED.glob("*/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


@pytest.mark.sweep
def test_making_reads_nothing_private_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for private in ("text_rows", "lm_rows", "image_rows"):
        monkeypatch.setattr(toyworld, private, lambda split: pytest.fail("private rows were read"))
    monkeypatch.setattr(pretrain, "_train", lambda modules, loss, steps, learning_rate: loss(0).backward())
    monkeypatch.setattr(toyworld, "_PUBLIC_IMAGES", 64)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for name in NAMES:
        pretrain.make(name, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.sweep
def test_what_is_made_hangs_on_no_global_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "_train", lambda modules, loss, steps, learning_rate: loss(0))
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        weights.append(load_file(pretrain.make("tiny_lm", tmp_path / str(seed)) / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("argument", "parts"),
    [("model=huge", ["model='huge'", "tiny_encoder"]), ("name=tiny_lm", ["'name'", "out=<folder>", "model="])],
)
def test_bad_argument(argument: str, parts: list[str], capsys: pytest.CaptureFixture) -> None:
    assert pretrain.main([argument]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("privzoo: ")
    assert printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err
