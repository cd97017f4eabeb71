"""The contract of a task, over every yaml in conf/task: a new one is tested by being there."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from privzoo.tasks.base import Task
from privzoo.tasks.cells import Column
from privzoo.tasks.completions import Completions
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.few_shot import FewShot

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "src" / "privzoo" / "models" / "tiny"
FILES = [path for path in sorted((REPOSITORY / "conf" / "task").glob("*.yaml")) if path.stem != "jsonl"]  # a user's own file
OF_KIND = {
    "sequence_classification": ("tiny_encoder", transformers.AutoModelForSequenceClassification),
    "causal_lm": ("tiny_lm", transformers.AutoModelForCausalLM),
    "image_classification": ("tiny_vit", transformers.AutoModelForImageClassification),
    "question_answering": ("tiny_encoder", transformers.AutoModelForQuestionAnswering),
}


def loaded(path):
    """The yaml, as part of a configuration."""
    whole = OmegaConf.create({"task": OmegaConf.load(path), "data": {"on_error": "raise"}})
    return OmegaConf.create(OmegaConf.to_container(whole.task, resolve=True))


def read(path, **changes):
    """The task, and its yaml, which has keys that are not for the class."""
    node = loaded(path)
    node.merge_with(changes)
    return instantiate({k: v for k, v in node.items() if not k.startswith("default_") and k != "num_examples"}), node


def few(path, count):
    """Changes so that few-shot data choose from the few rows of a test."""
    source = loaded(path).data
    if "source" not in source:
        return {}
    key = "per_class" if source.per_class is not None else "rows"
    return {"data": {key: count if key == "per_class" else 4 * count, "test_rows": 20}}


def is_toy(path):
    return loaded(path).data._target_.endswith(".ToyData")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml(path):
    task, node = read(path)
    assert isinstance(task, Task)
    assert task.name == path.stem
    assert task.kind in OF_KIND
    assert (task.num_labels is None) == (task.kind in ("causal_lm", "question_answering"))
    assert task.metrics
    assert isinstance(task.higher_is_better, bool)
    assert isinstance(node.num_examples, int) or (node.num_examples is None and isinstance(task._data, FewShot))
    assert isinstance(node.default_model, str) or "default" in node.default_model
    assert (node.get("default_pooling") == "pair") == (task.texts == 2)
    assert str(REPOSITORY) not in path.read_text()
    plain = (str, int, float, bool, list, tuple, dict, set, type(None), ToyData, HubData, FewShot, Completions)
    assert all(isinstance(value, (*plain, Column)) for value in vars(task).values()), "config inside"


@pytest.mark.parametrize("path", filter(is_toy, FILES), ids=lambda path: path.stem)
def test_toy_task_end_to_end(path):
    task, node = read(path)
    task.load(None)
    assert task.num_examples == node.num_examples
    check_the_contract(task)
    lengths = [task.length(task.train[i]) for i in range(500)]
    if hasattr(task, "max_length"):
        assert max(lengths) < task.max_length, "toy rows are not meant to be cut"


@pytest.mark.parametrize("path", [path for path in FILES if not is_toy(path)], ids=lambda path: path.stem)
def test_hub_task_end_to_end(path, tmp_path, write_hub_files):
    """On a few rows in the hub's format, of lengths from one word to more than fit."""
    changes = few(path, 5)
    changes |= {"completions": {"max_new_tokens": 16}} if "completions" in loaded(path) else {}
    changes |= WINDOWS if path.stem == "squad_spans" else {}
    is_text = "image" not in loaded(path)
    task, node = read(path, **changes, **({"max_length": 48} if is_text else {}))
    write_hub_files(node, tmp_path)
    task.load(str(tmp_path))
    check_the_contract(task)
    assert max(task.length(task.train[i]) for i in range(len(task.train))) == (48 if is_text else 1)


WINDOWS = {"stride": 8, "question_tokens": 16}  # so that 48 tokens are enough for one
METHODS = ("dp_full", "dp_lora", "dp_bitfit", "dpzero")


@pytest.mark.parametrize(
    ("path", "method"),
    [
        pytest.param(path, METHODS[i % 4], marks=() if path.stem == "mnli" else pytest.mark.sweep, id=path.stem)
        for i, path in enumerate(path for path in FILES if not is_toy(path))
    ],
)
def test_hub_task_trains(path, method, tmp_path, write_hub_files, privzoo):
    """Three releases by the command line, and every metric in the record."""
    chosen = few(path, 6)
    task, node = read(path, **chosen)
    write_hub_files(node, tmp_path / "data", rows=48)
    task.load(str(tmp_path / "data"))
    code, output = privzoo(
        f"task={path.stem}", f"method={method}", f"model={OF_KIND[task.kind][0]}", "eps=8", "delta=1e-3",
        *([f"model.pooling={node.default_pooling}"] if "default_pooling" in node else []),
        *[f"task.data.{key}={value}" for key, value in chosen.get("data", {}).items()],
        *(["task.completions.max_new_tokens=16"] if "completions" in node else []),
        *([f"task.{key}={value}" for key, value in WINDOWS.items()] if path.stem == "squad_spans" else []),
        f"data_root={tmp_path / 'data'}", *([] if "image" in node else ["task.max_length=48"]), "batch_size=10",
        "microbatch_size=8",
        f"epochs={25 / task.num_examples}", "trainer.accelerator=cpu", f"output_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "result.json").read_text())
    assert (record["state"], record["steps"]) == ("finished", 3)
    assert {f"metric/{name}" for name in task.metrics} <= record.keys()
    if task.problem_type is not None:
        assert json.loads((run / "model" / "config.json").read_text())["problem_type"] == task.problem_type


def check_the_contract(task):
    """What every task promises, on a tiny model of its kind."""
    assert task.fingerprint() == task.fingerprint()
    assert len(task.fingerprint()) == 64
    folder, model_class = OF_KIND[task.kind]
    processor_class = transformers.AutoImageProcessor if task.kind.startswith("image") else transformers.AutoTokenizer
    task.prepare(processor_class.from_pretrained(TINY / folder))
    assert len(task.train if task.rows_of_unit is None else task.rows_of_unit) == task.num_examples
    labels = {} if task.num_labels is None else {"num_labels": task.num_labels}
    model = model_class.from_pretrained(TINY / folder, **labels).double()
    check_rows_are_independent(task, model)
    ends = [*range(7), *range(len(task.validation) - 7, len(task.validation))]
    scores = task.evaluate(model, [as_double(task.collate([task.validation[i] for i in ends]))])
    assert tuple(scores) == task.metrics
    assert all(isinstance(score, float) for score in scores.values())


def check_rows_are_independent(task, model):
    """PRIVACY 7, 8 and 33: every row's loss and gradient in a micro-batch are its own alone, whatever stands beside it and
    however far it is padded; float64."""
    rows = [task.train[i] for i in range(6)]
    batch = as_double(task.collate(rows))
    assert {len(values) for values in batch.values()} == {6}
    together = task.losses(model, batch)
    alone = torch.cat([task.losses(model, as_double(task.collate([row]))) for row in rows])
    assert together.shape == (6,)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    for row in (0, 5):
        found, expected = (gradient_of(losses[row], model) for losses in (together, alone))
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(1, float(expected.abs().max())))


def gradient_of(loss, model):
    """Over all parameters, in one row."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)])


def as_double(batch):
    return {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}


@pytest.mark.shared
@pytest.mark.parametrize("path", [p for p in FILES if not is_toy(p)], ids=lambda path: path.stem)
def test_num_examples_agrees_with_the_real_data(path, shared):
    task, node = read(path)
    source = node.data.get("source", node.data)
    if not (shared / "data" / source.folder / f"{source.splits.train}.parquet").is_file():
        pytest.skip(f"{shared / 'data' / source.folder} has no train split")
    task.load(str(shared / "data"))
    if node.data.get("per_class") is None:
        assert task.num_examples == node.num_examples
    else:
        labels = task._tables["train"][node.label].to_pylist()
        assert max(map(labels.count, set(labels))) == node.data.per_class
        assert task.num_examples <= node.data.per_class * node.num_labels
