"""What a run would cost: `microbatch_size=auto` and `python -m privzoo.plan --cost`."""

import math

import pytest
import yaml

from privzoo.rehearsal import Cost, Tried, best
from privzoo.rehearsing import Stage

GIB = 2**30
FEW = ("trainer.accelerator=cpu", "eps=8", "trainer.progress=false")


@pytest.mark.parametrize(
    ("seconds", "memory", "chosen"),
    [
        ([8, 4, 2, 1.97, 3], None, 4),  # 8 rows are not faster by a twentieth
        ([8, 4, 2, 1, 0.5], None, 16),
        ([8, 4, 2, 1, 0.5], 16, 4),  # 8 rows would take 8 of 8 GiB, 4 rows 6.4 at most
        ([1], None, 1),
    ],
)
def test_the_smallest_that_is_about_as_fast_as_any_and_fits(seconds, memory, chosen):
    sizes = [2**i for i in range(len(seconds))]
    tried = [Tried(size, each, size * GIB, memory and memory * GIB // 2) for size, each in zip(sizes, seconds, strict=True)]
    assert best(tried).microbatch_size == chosen


def test_nothing_fits():
    assert best([]) is None
    assert best([Tried(1, 1.0, 9 * GIB, 10 * GIB)]) is None


def test_the_time_of_a_release_by_hand():
    found = Cost(
        microbatch_size=4,
        rows_per_unit=1.5,
        relative_length=0.5,
        seconds_per_row=0.1,
        seconds_besides=2.0,
        peak_memory_bytes=1,
    )
    assert found.seconds_per_release(20) == pytest.approx(2 + 20 * 1.5 * 0.5 * 0.1)
    assert found.seconds_per_release(20, processes=3) == pytest.approx(2 + 20 * 1.5 * 0.5 * 0.1 / 3)


@pytest.mark.parametrize(
    ("strategy", "trained", "expected"),
    [
        ("replicas", 400, 1000),
        ("zero1", 400, 1000 - 800 * 3 / 4),
        ("zero2", 300, 1000 - (800 + 50) * 3 / 4),
        ("zero3", 30, 1000 - (800 + 50 + 400) * 3 / 4),
        ("fsdp", 400, 1000 - (800 + 50 + 400) * 3 / 4),
        ("fsdp", 100, 1000 - (400 - 100) * 3 / 4),  # what is trained stays whole
    ],
)
def test_the_memory_of_a_rank_by_hand(strategy, trained, expected):
    found = Cost(4, 1.0, 1.0, 0.1, 2.0, 1000, weights_bytes=400, trained_bytes=trained, sums_bytes=50, state_bytes=800)
    assert found.memory_of_a_rank(strategy, 4) == round(expected)


def test_what_a_rehearsal_finds_to_deal_out(run_config, tmp_path):
    """AdamW keeps two numbers a trained weight, and a count a tensor."""
    stage = Stage(run_config(*FEW, "task=toy_text", "method=dp_bitfit"))
    found = stage.cost(4, tmp_path)
    trained = list(stage.method.active.values())
    values = sum(p.numel() for p in trained)
    assert found.weights_bytes == 4 * sum(p.numel() for p in stage.method.model.parameters())
    assert (found.trained_bytes, found.sums_bytes) == (4 * values, 4 * values)
    assert found.state_bytes == 2 * 4 * values + 4 * len(trained)


def test_the_time_of_a_row_hangs_on_how_long_training_rows_are(run_config, tmp_path):
    """SST-2's are half as long as its validation rows."""
    stage = Stage(run_config(*FEW, "task=toy_text", "method=dp_bitfit"))
    lengths = [[stage.task.length(row) for row in rows] for rows in (stage.training_rows, stage.rows)]
    expected = (sum(lengths[0]) / len(lengths[0])) / (sum(lengths[1]) / len(lengths[1]))
    assert stage.cost(4, tmp_path).relative_length == pytest.approx(expected)
    assert expected != 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("task=toy_text", "method=dp_bitfit_two_phase"),
        ("task=toy_lm", "method=dpzero", "trainer.precision=bf16-mixed", "method.smoothing=1"),
        ("task=toy_images", "method=dp_lora", "eps=inf"),
    ],
)
def test_a_rehearsal_computes_with_validation_rows_alone(overrides, run_config, tmp_path):
    """Nothing that it tells, and no size that it chooses, may hang on training rows."""
    stage = Stage(run_config(*FEW, *overrides))
    allowed = {text_of(row) for row in stage.task.validation}
    collate, seen = stage.task.collate, set()

    def watched(rows):
        seen.update(text_of(row) for row in rows)
        return collate(rows)

    stage.task.collate = watched
    tried = [stage.tried(size) for size in (1, 2)]
    found = stage.cost(4, tmp_path)
    assert seen
    assert seen <= allowed
    assert all(each.seconds_per_row > 0 and each.peak_memory_bytes > 1e7 for each in tried)
    assert found.seconds_per_row > 0
    assert found.seconds_besides > 0
    assert found.rows_per_unit == 1
    assert not math.isinf(found.seconds_per_release(100))


def text_of(row):
    return repr({name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()})


def test_auto_becomes_a_number_that_the_run_keeps(privzoo_on_few_rows, tmp_path):
    given = ("task=toy_text", "method=dp_bitfit", "epochs=0.2", "batch_size=100", *FEW, "privacy.noise_seed=3")
    code, output = privzoo_on_few_rows(*given, "microbatch_size=auto", f"output_dir={tmp_path}/auto")
    assert code == 0, output
    (folder,) = (tmp_path / "auto").iterdir()
    chosen = yaml.safe_load((folder / "config.yaml").read_text())["microbatch_size"]
    assert isinstance(chosen, int)
    assert f"privzoo: microbatch_size={chosen}: " in output
    code, output = privzoo_on_few_rows(*given, f"microbatch_size={chosen}", f"output_dir={tmp_path}/given")
    assert code == 0, output
    (other,) = (tmp_path / "given").iterdir()
    assert other.name == folder.name, "it is the same run"
    assert (other / "model" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    code, output = privzoo_on_few_rows(*given, "microbatch_size=auto", f"output_dir={tmp_path}/auto")
    assert code == 0
    assert "is finished already" in output
    assert "trying sizes" not in output


def test_costs_are_told_beside_the_plans(privzoo_on_few_rows):
    code, output = privzoo_on_few_rows(
        "--cost", "task=toy_text", "method=dp_head,dp_bitfit", *FEW, "microbatch_size=50", module="privzoo.plan"
    )
    assert code == 0, output
    plans, costs = output.split("Costs: ")
    assert "epsilon by PLD" in plans
    assert "rehearsal 2 of 2: toy_text, dp_bitfit" in plans
    for method in ("dp_head", "dp_bitfit"):
        (line,) = (line for line in costs.splitlines() if method in line)
        assert " 50 " in line
        assert "GiB" in line


@pytest.mark.parametrize(
    ("arguments", "module"), [(("--cost",), "privzoo.plan"), (("microbatch_size=auto",), "privzoo.train")]
)
def test_a_mistake_is_told_in_a_sentence(arguments, module, privzoo, tmp_path):
    given = ("task=toy_text", "method=dp_full", "model=roberta_base", "model.path=/nowhere", *FEW, f"output_dir={tmp_path}")
    code, output = privzoo(*arguments, *given, module=module)
    assert code == 2, output
    assert "/nowhere" in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())
