"""`task=jsonl` as a user has it: a file, a yaml outside the repository, and owners whose rows are one contribution."""

import json

import pytest

NAMES = ["Anchor", "Basil", "Clove", "Elm", "Fig", "Iris", "Mango", "Sage"]
ROWS = [
    {"q": f"name : {NAMES[i % 8]} ; food : {i}", "a": f"{NAMES[i % 8]} serves bread .", "who": i % 60, "good": i % 2}
    for i in range(240)
]
RUN = ["eps=8", "batch_size=20", "microbatch_size=8", "trainer.accelerator=cpu", "task.max_length=32"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def result(folder):
    (run,) = folder.iterdir()
    return json.loads((run / "result.json").read_text()), json.loads((run / "privacy.json").read_text())


@pytest.mark.parametrize("method", ["dp_lora", pytest.param("dpzero", marks=pytest.mark.sweep)])
def test_owners(method, file, tmp_path, privzoo):
    """PRIVACY 1 and 37: N, q, B and delta count owners; the card says whose rows are one contribution."""
    code, output = privzoo(
        "task=jsonl", f"method={method}", "model=tiny_lm", f"data.path={file}", *RUN, "epochs=1",
        "task.data.columns={prompt: q, response: a}", "task.data.owner=who", "task.data.rows_per_owner=3",
        f"output_dir={tmp_path}/runs",
    )  # fmt: skip
    assert code == 0, output
    record, card = result(tmp_path / "runs")
    assert 40 <= record["num_examples"] <= 60
    assert record["sample_rate"] == 20 / record["num_examples"]
    assert record["delta"] < 1 / (2 * record["num_examples"]) * 1.001
    assert f"one owner of the {record['num_examples']} in training" in card["statement"]
    assert card["plan"]["unit"] == "owner"
    assert any("by the column 'who': at most 3 rows" in limit for limit in card["limits"])


def test_a_yaml_outside_and_labels_by_name(file, tmp_path, privzoo):
    """The task's yaml in a folder of the user's, one row that is no row, skipped and told."""
    with file.open("a") as stream:
        stream.write(json.dumps(ROWS[0] | {"good": "maybe"}) + "\n")
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "reviews.yaml").write_text(
        "defaults: [jsonl]\nname: reviews\nkind: classification\nlabel_names: [bad, good]\ndefault_model: tiny_encoder\n"
        "data: {columns: {text: q, label: good}}\n"
    )
    common = ["task=reviews", "method=dp_head", f"data.path={file}", *RUN, "epochs=0.2", f"output_dir={tmp_path}/runs"]
    code, output = privzoo("--config-dir", f"{tmp_path}/mine", *common)
    assert code == 2
    assert "row 240: 'good' is 'maybe', expected one of the declared names (bad, good)" in output
    code, output = privzoo("--config-dir", f"{tmp_path}/mine", *common, "data.on_error=skip")
    assert code == 0, output
    record, card = result(tmp_path / "runs")
    assert record["task"] == "reviews"
    assert "metric/accuracy" in record
    assert any("1 rows of the file were not what the task expects" in limit for limit in card["limits"])
    assert "one example of the" in card["statement"]


@pytest.mark.parametrize("task", ["sst2", "sst2_1k"])
def test_rows_of_a_published_set_are_skipped_and_the_card_says_so(task, privzoo, tmp_path):
    """By the command line; without data.on_error=skip the file and the row are named."""
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": f"a film of {i} parts", "label": i % 2} for i in range(60)]
    for split in ("train", "validation"):
        lines = [json.dumps(row) for row in (rows if split == "train" else rows[::-1])]
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(
            "\n".join([*lines[:30], '{"sentence": "odd", "label": 7}', *lines[30:]])
        )
    argv = [
        f"task={task}", "method=dp_head", "model=tiny_encoder", "model.pooling=null", "eps=8", "delta=1e-3", "batch_size=10",
        "epochs=0.5", "task.max_length=32", f"data_root={tmp_path}", f"output_dir={tmp_path}/runs",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
    argv += ["task.data.rows=40"] if task == "sst2_1k" else []
    code, output = privzoo(*argv)
    assert code == 2
    assert "sst2/train.jsonl, row 30: 'label' is 7" in output
    code, output = privzoo(*argv, "data.on_error=skip")
    assert code == 0, output
    _, card = result(tmp_path / "runs")
    said = "1 rows of train and 1 rows of validation were not what the task expects"
    assert any(said in limit for limit in card["limits"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=jsonl"], "data.path=<file> beside task=jsonl"),
        (["task=jsonl", "data.path=/no/such.jsonl"], "data.path=/no/such.jsonl to be a file"),
        (["task=toy_text", "data.path=x.jsonl"], "to be null for task=toy_text"),
        (["task=toy_text", "data.on_error=skip"], "its data cannot skip rows"),
        (["task=jsonl", "data.on_error=ignore"], "data.on_error=ignore"),
        (["task=jsonl", "data.pth=x"], "did you mean 'data.path'?"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_mistakes_are_one_sentence(arguments, message, privzoo, tmp_path):
    code, output = privzoo(*arguments, f"output_dir={tmp_path}/runs")
    assert code == 2
    assert message in output
    assert not (tmp_path / "runs").exists()
