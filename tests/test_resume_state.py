"""PRIVACY 35: a killed run goes on to the same clip norm, optimizer state and average, and what is saved is the average."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# 8 releases with checkpoints after 3, 6 and 8.
COMMAND = [
    "task=toy_text", "method=dp_bitfit", "eps=8", "batch_size=100", "microbatch_size=50", "epochs=0.8",
    "trainer.checkpoint_every=3", "trainer.progress=false", "trainer.accelerator=cpu", "privacy.noise_seed=7",
    "method.adaptive={_target_:privzoo.privacy.clipping.AdaptiveClip,quantile:0.3}",
    "method.average={_target_:privzoo.methods.average.ExponentialAverage,decay:0.5}",
    "method.optimizer._target_=privzoo.methods.dp_adam.DPAdamBC", "~method.optimizer.fused",
    "method.engine.clipping._target_=privzoo.privacy.clipping.AutoS", "+method.engine.clipping.stability=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def privzoo(privzoo_on_few_rows):
    return privzoo_on_few_rows


def only_run(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return run


@pytest.fixture(scope="module")
def straight(privzoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    code, output = privzoo(*COMMAND, "trainer.validate_every=3", f"output_dir={folder}")
    assert code == 0, output
    return only_run(folder)


def checkpoint_of(run: Path) -> dict:
    return torch.load(run / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("at", "count"),
    [
        pytest.param("fsync ledger.jsonl", 5, id="between"),
        pytest.param("replace privacy.json", 1, id="at the end", marks=pytest.mark.sweep),
    ],
)
def test_a_killed_run_goes_on_to_the_same_state(privzoo, straight, tmp_path, at, count):
    """Killed in its fifth release, with a checkpoint of the third, or when all releases were made; without validation,
    which must not change what comes after it."""
    kill = {"at": at, "count": count, "when": "after" if count > 1 else "before"}
    code, output = privzoo(*COMMAND, f"output_dir={tmp_path}", kill=kill)
    assert code < 0, output
    run = only_run(tmp_path)
    code, output = privzoo(f"resume={run}")
    assert code == 0, output
    assert [line.split('"weights"')[1] for line in (run / "ledger.jsonl").read_text().splitlines()] == [
        line.split('"weights"')[1] for line in (straight / "ledger.jsonl").read_text().splitlines()
    ]
    expected, found = checkpoint_of(straight), checkpoint_of(run)
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    assert all(torch.equal(value, found["state_dict"][name]) for name, value in expected["state_dict"].items())
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (straight / model).read_bytes()


def test_the_ledger_says_what_the_plan_says(straight):
    lines = (straight / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert all('"clip_norm": 0.1,' in line for line in lines)
    assert checkpoint_of(straight)["state_dict"]["adaptive.scale"] != 1


def test_what_is_saved_and_scored_is_the_average(privzoo, straight):
    state, saved = checkpoint_of(straight)["state_dict"], load_file(straight / "model" / "model.safetensors")
    trained = [name.removeprefix("model.") for name in state if name.startswith("model.")]
    averages = [value for name, value in state.items() if name.startswith("average.averaged.module.")]
    assert len(averages) == len(trained)
    for name, average in zip(trained, averages, strict=True):
        assert torch.equal(saved[name], average)
        assert not torch.equal(state[f"model.{name}"], average)
    code, output = privzoo(f"run={straight}", module="privzoo.evaluate")
    assert code == 0, output
    row = next(line for line in output.splitlines() if "accuracy" in line)
    now, before = (float(cell) for cell in row.strip("│ ").split("│")[1:])
    assert now == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.adaptive={_target_:privzoo.privacy.clipping.AdaptiveClip,quantil:0.3}", "quantil"),
        ("method.average={_target_:privzoo.methods.average.ExponentialAverage,decay:2}", "method.average.decay=2"),
        ("+method.engine.clipping.stability=1", "stability"),
        ("method.adaptive={_target_:privzoo.privacy.clipping.AdaptiveClip,count_noise:0.01}", "count_noise=0.01"),
        ("method.optimizer._target_=torch.optim.LBFGS ~method.optimizer.fused ~method.optimizer.weight_decay",
         "LBFGS doesn't support per-parameter options"),
        ("method.optimizer._target_=torch.optim.RMSprop", "RMSprop has no argument 'fused'"),
        ("method.optimizer={_target_:absent_package.Optimizer,_partial_:true}", "'absent_package'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(privzoo, tmp_path, override, sentence):
    code, output = privzoo(*COMMAND[:9], *override.split(), f"output_dir={tmp_path}")
    assert code == 2, output
    assert sentence in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1, output
