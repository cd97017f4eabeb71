"""A whole run on the embedded default: what lies in its folder, and that it says what happened."""

import csv
import json
import math
from pathlib import Path

import pytest

QUICK = ["epochs=0.8", "batch_size=100", "microbatch_size=50", "trainer.accelerator=cpu", "trainer.validate_every=3"]


@pytest.fixture(scope="module")
def privzoo(privzoo_on_few_rows):
    return privzoo_on_few_rows


@pytest.fixture(scope="module")
def finished(privzoo, tmp_path_factory):
    """A private run of toy_text with dp_bitfit, its output, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    code, output = privzoo("task=toy_text", "method=dp_bitfit", "eps=8", *QUICK, f"output_dir={folder}")
    assert code == 0, output
    (run,) = folder.iterdir()
    return run, output


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


def test_the_folder_holds_what_the_contract_says(finished):
    run, _ = finished
    assert run.name.startswith("toy_text-dp_bitfit-eps8-s0-")
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "overrides.yaml", "result.json", "privacy.json", "metrics.csv", "ledger.jsonl", "last.ckpt",
        "model",
    }  # fmt: skip


def test_the_saved_model_names_its_classes(finished):
    config = read(finished[0] / "model", "config.json")
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["label2id"] == {"bad": 0, "good": 1}


def test_epsilon_by_three_accountants(finished):
    """PRIVACY 20, 39: PLD of the ledger is 0.99 to 1 of the target, PRV beside it, RDP 1 to 1.35 times it."""
    run, _ = finished
    record, card = read(run, "result.json"), read(run, "privacy.json")
    assert record["epsilon_spent"] == card["epsilon_spent"]
    assert 0.99 * 8 <= record["epsilon_spent"] <= 8
    assert card["cross_check"]["prv"] == pytest.approx(record["epsilon_spent"], abs=0.03)
    assert 1 <= card["cross_check"]["rdp"] / record["epsilon_spent"] <= 1.35


def test_steps_are_releases_are_ledger_lines(finished):
    """PRIVACY 24."""
    run, _ = finished
    record, card = read(run, "result.json"), read(run, "privacy.json")
    lines = (run / "ledger.jsonl").read_text().splitlines()
    assert record["steps"] == record["steps_planned"] == len(lines) == card["releases_charged"] == 8
    assert record["steps"] == math.ceil(0.8 * record["num_examples"] / 100)
    assert record["state"] == "finished"


def test_the_card_names_unit_relation_and_limits(finished):
    run, _ = finished
    card = read(run, "privacy.json")
    assert card["private"] is True
    assert (card["plan"]["unit"], card["plan"]["neighbours"], card["plan"]["sampling"]) == (
        "example", "add_or_remove_one", "poisson",
    )  # fmt: skip
    assert card["plan"]["delta"] < 1 / card["plan"]["num_examples"]
    assert card["contribution"] == "a gradient, scaled as a whole by Flat() to a norm of at most clip_norm"
    assert card["limits"]
    assert "256 bits from the operating system" in card["run_key"]


def test_private_figures_stay_out_of_every_file(finished):
    """PRIVACY 34: no train loss, norm, clip rate or realised batch size on disk."""
    run, _ = finished
    header = next(csv.reader((run / "metrics.csv").open()))
    assert set(header) == {"step", "lr", "examples_per_s", "epsilon", "validation/accuracy", "validation/loss"}
    for file in run.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".csv", ".jsonl"):
            assert b"private/" not in file.read_bytes().replace(b"private/... figures", b"")


def test_epsilon_rises_along_the_curve_and_never_understates(finished):
    from privzoo.privacy.accounting import Release, epsilon_spent

    run, _ = finished
    record = read(run, "result.json")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    release = Release(record["sample_rate"], record["noise_multiplier"])
    for row in rows:
        assert float(row["epsilon"]) >= epsilon_spent([(release, int(row["step"]))], record["delta"]) - 1e-9
    assert float(rows[-1]["epsilon"]) == pytest.approx(record["epsilon_spent"], rel=1e-3)


def test_the_saved_model_is_the_one_that_was_scored(finished, privzoo):
    """transformers loads it without privzoo; evaluate finds the record's metrics again."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, _ = finished
    assert AutoModelForSequenceClassification.from_pretrained(run / "model").num_labels == 2
    assert AutoTokenizer.from_pretrained(run / "model").pad_token is not None
    code, output = privzoo(f"run={run}", module="privzoo.evaluate")
    assert code == 0, output
    record = read(run, "result.json")
    row = next(line for line in output.splitlines() if "accuracy" in line)
    now, before = (float(cell) for cell in row.strip("│ ").split("│")[1:])
    assert now == before == pytest.approx(record["metric/accuracy"])


def test_mean_pooling_and_group_wise_clipping_end_to_end(privzoo, tmp_path):
    """The saved class is found again, and scores as it did; the head's own rate and the groups are in the configuration."""
    argv = ["model.pooling=mean", "+method.engine.groups=layer", "method.head_lr_factor=3"]
    code, output = privzoo(*argv, *QUICK, f"output_dir={tmp_path}")
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    assert (run / "model" / "mean_pooling.py").is_file()
    config = (run / "config.yaml").read_text()
    assert all(f"{key}\n" in config for key in ("groups: layer", "head_lr_factor: 3", "pooling: mean"))
    code, output = privzoo(f"run={run}", module="privzoo.evaluate")
    assert code == 0, output
    row = next(line for line in output.splitlines() if "accuracy" in line)
    now, before = (float(cell) for cell in row.strip("│ ").split("│")[1:])
    assert now == before == pytest.approx(read(run, "result.json")["metric/accuracy"])


def test_the_table_at_the_end(finished):
    run, output = finished
    for word in ("accuracy", "untrained", "ε", "δ", "σ", "steps", "time", "memory", run.name):
        assert word in output


@pytest.mark.parametrize(
    ("task", "model"), [("toy_text", "tiny_encoder"), ("toy_lm", "tiny_lm"), ("toy_images", "tiny_vit")]
)
@pytest.mark.parametrize("method", ["dp_full", pytest.param("dp_bitfit", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("eps", ["8", pytest.param("inf", marks=pytest.mark.sweep)])
def test_every_task_with_every_method(privzoo, tmp_path, task, model, method, eps):
    code, output = privzoo(
        f"task={task}", f"method={method}", f"eps={eps}", "epochs=0.8", "batch_size=100", "microbatch_size=100",
        "trainer.accelerator=cpu", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    record = read(run, "result.json")
    assert (record["model"], record["state"]) == (model, "finished")
    assert record["private"] is (eps == "8")
    assert (record["epsilon_spent"] is None) is (eps == "inf")


@pytest.mark.parametrize(
    "argv",
    [
        ("task=toy_images", "method=dp_lora", "trainer.precision=bf16-mixed", "model.dropout=0.1",
         "method.adapter.tuner.lora_dropout=0.1"),
        ("task=toy_text", "method=dp_head", "trainer.precision=bf16-mixed"),
        ("task=toy_text", "task.head=prompt", "method=dp_full"),
        ("task=toy_text", "task.head=prompt", "method=dp_lora", "model=tiny_lm"),
        ("task=toy_lm", "method=dp_qlora", "method.merge=true", "trainer.gradient_checkpointing=true"),
        ("task=toy_text", "method=dpzero", "model.quantization=nf4", "method.smoothing=0.1", "clip_norm=50"),
    ],
    ids=lambda argv: " ".join(argv),
)  # fmt: skip
def test_the_other_methods_and_the_score_again(privzoo, tmp_path, argv):
    """`evaluate` on the saved model gives what the run gave, in the run's precision and on its 4-bit base."""
    code, output = privzoo(
        *argv, "epochs=0.4", "batch_size=100", "microbatch_size=100", "trainer.accelerator=cpu", f"output_dir={tmp_path}"
    )
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    record = read(run, "result.json")
    assert record["state"] == "finished"
    assert (run / "merged" / "config.json").exists() is ("method.merge=true" in argv)
    metrics = {key.removeprefix("metric/"): value for key, value in record.items() if key.startswith("metric/")}
    code, output = privzoo(f"run={run}", module="privzoo.evaluate")
    assert code == 0, output
    for name, value in metrics.items():
        row = next(line for line in output.splitlines() if name in line)
        assert row.count(f"{value:.6g}") == 2, row


def test_a_sweep_is_two_runs(privzoo, tmp_path):
    code, output = privzoo("-m", "eps=3,inf", "epochs=0.8", "trainer.accelerator=cpu", f"output_dir={tmp_path}")
    assert code == 0, output
    runs = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert sorted(read(run, "result.json")["epsilon_target"] or 0 for run in runs) == [0, 3]
    code, output = privzoo(str(tmp_path), module="privzoo.reporting.display")
    assert code == 0
    assert "dp_bitfit" in output


def test_a_test_seed_marks_everything_not_private(privzoo, tmp_path):
    """PRIVACY 36."""
    code, output = privzoo("privacy.noise_seed=1", "epochs=0.8", "trainer.accelerator=cpu", f"output_dir={tmp_path}")
    assert code == 0
    (run,) = tmp_path.iterdir()
    record, card = read(run, "result.json"), read(run, "privacy.json")
    assert "NOT PRIVATE" in output
    assert record["private"] is card["private"] is False
    assert record["epsilon_spent"] is card["epsilon_spent"] is None
    assert "noise_seed" in record["not_private_reason"]
    assert card["statement"].startswith("NOT PRIVATE")


def test_two_private_runs_share_nothing_but_their_seed(privzoo, tmp_path):
    """PRIVACY 36: the published seed fixes neither draws nor noise."""
    draws = []
    for name in ("a", "b"):
        file = tmp_path / f"{name}.draws"
        code, output = privzoo(
            "seed=0", "epochs=0.8", "trainer.accelerator=cpu", f"output_dir={tmp_path}/{name}", draws=str(file)
        )
        assert code == 0, output
        draws.append(file.read_text())
    assert draws[0] != draws[1]
    weights = [next(tmp_path.glob(f"{name}/*/model/model.safetensors")).read_bytes() for name in ("a", "b")]
    assert weights[0] != weights[1]
