"""Real tasks with the embedded models: neither padding nor the neighbours reach an example's gradient."""

import math

import pytest
import torch

from privzoo.models.loading import load
from privzoo.privacy.clipping import BookKeeping
from privzoo.tasks.classification import Classification
from privzoo.tasks.data import ToyData
from privzoo.tasks.images import ImageClassification
from privzoo.tasks.language_modelling import PromptCompletion

TASKS = {
    "text": (lambda: Classification("toy_text", ToyData("text"), ["text"], "label", 2, 24), "tiny_encoder"),
    "lm": (lambda: PromptCompletion("toy_lm", ToyData("lm"), "{prompt} =", " {target}", 64), "tiny_lm"),
    "images": (lambda: ImageClassification("toy_images", ToyData("images"), "image", "label", 4), "tiny_vit"),
}


@pytest.fixture(scope="module")
def prepared():
    """`prepared("lm")`: (task, its model in float64, four rows of different lengths where there are such)."""
    made = {}

    def make(name):
        if name not in made:
            task, path = TASKS[name][0](), TASKS[name][1]
            task.load(None)
            loaded = load(path, task.kind, task.num_labels)
            task.prepare(loaded.processor)
            examined = 4 if name == "images" else 200  # images are all of one size
            rows = sorted((task.train[i] for i in range(examined)), key=task.length)
            by_length = {task.length(row): row for row in rows}
            rows = rows if name == "images" else [by_length[k] for k in sorted(by_length)[:3]] + rows[-1:]
            made[name] = task, loaded.model.double().train(), rows
        return made[name]

    return make


def gradient(task, model, rows, row, batch=None):
    """Gradient of one row's loss in a batch, flat; by plain autograd."""
    batch = batch or collated(task, rows)
    loss = task.losses(model, batch)[row]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([value.flatten() for value in found if value is not None])


def collated(task, rows):
    return {k: v.double() if v.is_floating_point() else v for k, v in task.collate(rows).items()}


@pytest.mark.parametrize("name", TASKS)
def test_one_loss_a_row(name, prepared):
    """PRIVACY lines 7 and 33."""
    task, model, rows = prepared(name)
    found = BookKeeping(model)(lambda: task.losses(model, collated(task, rows)), math.inf)
    assert found.losses.shape == found.norms.shape == (4,)
    assert (found.norms > 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_neighbours_of_the_same_length_do_not_show_in_a_bit(name, prepared):
    """PRIVACY line 7: at equal padded length the gradient of row 0 is bit-equal whatever stands beside it."""
    task, model, rows = prepared(name)
    first, *others = rows
    longest = max(rows, key=task.length)
    one = gradient(task, model, [first, longest, others[0]], 0)
    other = gradient(task, model, [first, longest, others[1]], 0)
    relabelled = dict(collated(task, [first, longest, others[0]]))
    relabelled["labels"] = relabelled["labels"].clone()
    relabelled["labels"][1:] = relabelled["labels"][1:].flip(0)
    assert one.any()
    assert torch.equal(one, other)
    assert torch.equal(one, gradient(task, model, None, 0, relabelled))


@pytest.mark.parametrize("name", ["text", "lm"])
def test_padding_does_not_show(name, prepared):
    """PRIVACY line 8: alone, or padded to two other lengths, the same gradient and the same norm to 1e-12."""
    task, model, rows = prepared(name)
    assert task.length(rows[0]) < task.length(rows[1]) < task.length(rows[-1])
    engine = BookKeeping(model)
    alone = gradient(task, model, rows[:1], 0)
    norm = engine(lambda: task.losses(model, collated(task, rows[:1])), math.inf).norms[0]
    for neighbour in (rows[1], rows[-1]):
        padded = [rows[0], neighbour]
        difference = (gradient(task, model, padded, 0) - alone).abs().max()
        assert difference <= 1e-12 * alone.abs().max()
        found = engine(lambda p=padded: task.losses(model, collated(task, p)), math.inf)
        torch.testing.assert_close(found.norms[0], norm, rtol=1e-12, atol=0)


def test_a_row_without_any_target(prepared):
    """PRIVACY line 8: all labels masked: loss 0, gradient 0, no NaN; the neighbours count as if it were not there."""
    task, model, rows = prepared("lm")
    batch = collated(task, rows)
    batch["labels"][1] = -100
    found = BookKeeping(model)(lambda: task.losses(model, batch), 0.1)
    others = {key: value[[0, 2, 3]] for key, value in batch.items()}
    expected = BookKeeping(model)(lambda: task.losses(model, others), 0.1)
    assert found.losses[1] == 0
    assert found.norms[1] == 0
    assert all(torch.isfinite(value).all() for value in found.sums.values())
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-10, atol=1e-14)
