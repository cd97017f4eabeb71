"""The contract of a task, over every yaml in conf/task: a new one is tested by being there."""

from pathlib import Path

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from privzoo.tasks.base import Task
from privzoo.tasks.completions import Completions
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.few_shot import FewShot

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "src" / "privzoo" / "models" / "tiny"
FILES = sorted((REPOSITORY / "conf" / "task").glob("*.yaml"))
OF_KIND = {
    "sequence_classification": ("tiny_encoder", transformers.AutoModelForSequenceClassification),
    "causal_lm": ("tiny_lm", transformers.AutoModelForCausalLM),
    "image_classification": ("tiny_vit", transformers.AutoModelForImageClassification),
}


def read(path):
    """The task, and the two keys of its yaml that are not for the class."""
    node = OmegaConf.load(path)
    return instantiate({k: v for k, v in node.items() if k not in ("default_model", "num_examples")}), node


def is_toy(path):
    return OmegaConf.load(path).data._target_.endswith(".ToyData")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml(path):
    task, node = read(path)
    assert isinstance(task, Task)
    assert task.name == path.stem
    assert task.kind in OF_KIND
    assert (task.num_labels is None) == (task.kind == "causal_lm")
    assert task.metrics
    assert isinstance(task.higher_is_better, bool)
    assert isinstance(node.num_examples, int) or (node.num_examples is None and isinstance(task._data, FewShot))
    assert isinstance(node.default_model, str) or "default" in node.default_model
    assert str(REPOSITORY) not in path.read_text()
    plain = (str, int, float, bool, list, tuple, dict, type(None), ToyData, HubData, FewShot, Completions)
    assert all(isinstance(value, plain) for value in vars(task).values()), "config inside"


@pytest.mark.parametrize("path", filter(is_toy, FILES), ids=lambda path: path.stem)
def test_toy_task_end_to_end(path):
    task, node = read(path)
    task.load(None)
    assert task.num_examples == node.num_examples
    assert task.fingerprint() == task.fingerprint()
    assert len(task.fingerprint()) == 64
    folder, model_class = OF_KIND[task.kind]
    processor_class = transformers.AutoImageProcessor if task.kind.startswith("image") else transformers.AutoTokenizer
    task.prepare(processor_class.from_pretrained(TINY / folder))
    assert len(task.train) == task.num_examples
    lengths = [task.length(task.train[i]) for i in range(500)]
    if hasattr(task, "max_length"):
        assert max(lengths) < task.max_length, "toy rows are not meant to be cut"
    labels = {} if task.num_labels is None else {"num_labels": task.num_labels}
    model = model_class.from_pretrained(TINY / folder, **labels).double()
    check_rows_are_independent(task, model)
    scores = task.evaluate(model, [as_double(task.collate([task.validation[i] for i in range(7)]))])
    assert tuple(scores) == task.metrics
    assert all(isinstance(score, float) for score in scores.values())


def check_rows_are_independent(task, model):
    """Every row's loss in a micro-batch is its loss alone; float64."""
    rows = [task.train[i] for i in range(6)]
    batch = as_double(task.collate(rows))
    assert {len(values) for values in batch.values()} == {6}
    with torch.no_grad():
        together = task.losses(model, batch)
        alone = torch.cat([task.losses(model, as_double(task.collate([row]))) for row in rows])
    assert together.shape == (6,)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    units = task.unit_of_row(batch)
    assert units is None or units.shape == (6,)


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
    few_shot = "source" in node.data
    assert task.num_examples == (node.data.per_class * node.num_labels if few_shot else node.num_examples)
