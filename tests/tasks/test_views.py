"""Views of images (augmentation multiplicity): one contribution, whatever the others are (PRIVACY 37)."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from privzoo.errors import UserError
from privzoo.privacy.clipping import BookKeeping, Loop
from privzoo.tasks.images import ImageClassification, changed
from privzoo.tasks.splits import refuse_same_rows
from privzoo.tasks.units import FirstRows

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def ready(source, folder):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3)

    def of(pixels, views):
        task = ImageClassification("t", source, "img", "y", 3, views=views)
        cells = pa.array([{"bytes": png(each), "path": None} for each in pixels])
        rows = {"img": cells, "y": [i % 3 for i in range(len(pixels))]}
        task.load(folder(train=rows, validation=rows))
        task.prepare(processor)
        return task

    return of


def test_views_of_an_image_are_one_unit(ready):
    task = ready(PIXELS, 3)
    assert (task.num_examples, len(task.train), len(task.validation)) == (6, 18, 6)
    assert [unit.tolist() for unit in task.rows_of_unit] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    first = [task.train[i]["pixel_values"] for i in range(3)]
    assert np.array_equal(first[0], task.validation[0]["pixel_values"]), "view 0 is the image as it is"
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[1], first[2])
    assert np.array_equal(first[1], task.train[1]["pixel_values"]), "a view is the same every time"
    assert [task.train[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert ready(PIXELS, 1).rows_of_unit is None


def test_one_image_less_changes_no_other_view(ready):
    """By a stream of numbers all later images would get other views, which no bound speaks of."""
    whole, fewer = ready(PIXELS, 4), ready(PIXELS[1:], 4)
    for row in range(len(fewer.train)):
        assert np.array_equal(fewer.train[row]["pixel_values"], whole.train[row + 4]["pixel_values"])


def test_a_view_by_hand():
    """An eighth of 16 is 2: rows and columns 2 - top.. of the image, the edge mirrored, and mirrored or not."""
    for seed in range(20):
        found = np.asarray(changed(Image.fromarray(PIXELS[0]), np.random.default_rng(seed)))
        stream = np.random.default_rng(seed)
        top, left = stream.integers(0, 5), stream.integers(0, 5)
        padded = np.pad(PIXELS[0], [(2, 2), (2, 2), (0, 0)], mode="symmetric")
        expected = padded[top : top + 16, left : left + 16]
        assert np.array_equal(found, expected[:, ::-1] if stream.integers(0, 2) else expected)


def test_views_are_averaged(ready):
    """The gradient of an image is the mean of those of its views, and is clipped as one."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
        )
    ).double()  # fmt: skip
    task = ready(PIXELS, 3)
    batch = task.collate([task.train[i] for i in range(6)])
    batch["pixel_values"] = batch["pixel_values"].double()
    units = torch.tensor([0, 0, 0, 1, 1, 1])
    found = BookKeeping(model)(lambda: task.losses(model, batch), clip_norm=1e9, unit_of_row=units)
    one = {name: values[:3] for name, values in batch.items()}
    model.zero_grad()
    plain = torch.nn.functional.cross_entropy(model(pixel_values=one["pixel_values"]).logits, one["labels"])  # the mean
    plain.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(found.norms[0]) == pytest.approx(float(norm))
    loop = Loop(model)(lambda: task.losses(model, batch), clip_norm=1e-3, unit_of_row=units)
    clipped = BookKeeping(model)(lambda: task.losses(model, batch), clip_norm=1e-3, unit_of_row=units)
    torch.testing.assert_close(clipped.sums, loop.sums)


def test_views_are_a_number():
    with pytest.raises(UserError, match=r"task\.views=0"):
        ImageClassification("t", None, "img", "y", 3, views=0)


def test_scoring_the_training_images_is_refused(ready):
    """With several views the training split is longer than its own copy, and no copy row for row."""
    task = ready(PIXELS, 3)
    refuse_same_rows(task.train, task.validation)
    with pytest.raises(UserError, match="the same 6 rows"):
        refuse_same_rows(FirstRows(task.train, task.rows_of_unit), task.validation)
