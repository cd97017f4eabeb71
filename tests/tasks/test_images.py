import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from privzoo.errors import UserError
from privzoo.tasks.data import HubData
from privzoo.tasks.images import ImageClassification

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 1, 0]


def png(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def cells(blobs):
    return pa.array([{"bytes": blob, "path": None} for blob in blobs])


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).double()


@pytest.fixture
def ready(source, folder, processor):
    def of(images, labels=LABELS):
        task = ImageClassification("t", source, "img", "y", 3)
        rows = {"img": images, "y": labels}
        task.load(folder(train=rows, validation=rows))
        task.prepare(processor)
        return task

    return of


@pytest.fixture
def task(ready):
    return ready(cells(map(png, PIXELS)))


def expected_pixels(pixels):
    return ((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1)


def in_double(batch):
    return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}


@pytest.mark.parametrize("form", ["struct", "bytes", "tensor"])
def test_every_form_gives_the_pixels(ready, form):
    images = {
        "struct": cells(map(png, PIXELS)),
        "bytes": pa.array(list(map(png, PIXELS))),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS),
    }[form]
    task = ready(images)
    assert task.num_examples == len(task.train) == len(task.validation) == 5
    for row, pixels, label in zip(task.train, PIXELS, LABELS, strict=True):
        assert row["label"] == label
        np.testing.assert_allclose(row["pixel_values"], expected_pixels(pixels), atol=1e-6)
    with pytest.raises(IndexError):
        task.train[5]


def test_grey_and_transparent_images_become_rgb(ready):
    grey = np.full((8, 8), 200, np.uint8)
    alpha = np.dstack([PIXELS[0], np.full((8, 8), 255, np.uint8)])
    task = ready(cells([png(grey), png(alpha)]), [0, 1])
    np.testing.assert_allclose(task.train[0]["pixel_values"], expected_pixels(np.dstack([grey] * 3)), atol=1e-6)
    np.testing.assert_allclose(task.train[1]["pixel_values"], expected_pixels(PIXELS[0]), atol=1e-6)
    task = ready(pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([grey, grey])), [0, 1])
    np.testing.assert_allclose(task.train[0]["pixel_values"], expected_pixels(np.dstack([grey] * 3)), atol=1e-6)


def test_an_image_of_absurd_size_is_refused_at_load(ready, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"row 0 cannot be decoded \(Image size"):
        ready(cells([png(PIXELS[0])]), [0])


def test_order_is_found_without_decoding(task):
    """Rows are all of one length, and decoding is what costs."""

    class NotToBeRead(list):
        def __getitem__(self, index):
            raise AssertionError("a row was decoded")

    assert task.by_length(NotToBeRead(range(5))) == [0, 1, 2, 3, 4]


def test_collate(task):
    batch = task.collate([task.train[2], task.train[0]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(batch["pixel_values"][0], expected_pixels(PIXELS[2]), atol=1e-6)
    assert batch["labels"].tolist() == [2, 0]
    assert {task.length(row) for row in task.train} == {1}


def test_losses_and_gradients_are_each_rows_own(task, vit, gradients):
    reference = task.losses(vit, in_double(task.collate([task.train[0], task.train[1]])))
    expected = gradients(reference, vit)[0]
    for other in (2, 3):
        losses = task.losses(vit, in_double(task.collate([task.train[0], task.train[other]])))
        assert torch.equal(losses[0], reference[0])
        assert torch.equal(gradients(losses, vit)[0], expected)
    alone = in_double(task.collate([task.train[0]]))
    log_probabilities = vit(alone["pixel_values"]).logits[0].log_softmax(0)
    torch.testing.assert_close(reference[0], -log_probabilities[LABELS[0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(task.losses(vit, alone), vit)[0], expected, rtol=0, atol=1e-12)


def test_evaluate_equals_one_row_at_a_time(task, vit, batches):
    right, loss = 0, 0.0
    for row in task.validation:
        logits = vit(torch.from_numpy(row["pixel_values"])[None].double()).logits[0]
        right += int(logits.argmax() == row["label"])
        loss -= logits.log_softmax(0)[row["label"]].item() / 5
    loader = (in_double(task.collate(rows)) for rows in batches(task.validation, 2))
    scores = task.evaluate(vit.train(), loader)
    assert scores == {"accuracy": right / 5, "loss": pytest.approx(loss, abs=1e-12)}
    assert vit.training


def test_fingerprint(ready):
    base = ready(cells(map(png, PIXELS))).fingerprint()
    assert ready(cells(map(png, PIXELS))).fingerprint() == base
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    others = [
        ready(cells(map(png, changed))).fingerprint(),
        ready(cells(map(png, PIXELS)), [0, 1, 2, 1, 1]).fingerprint(),
        ready(cells(map(png, PIXELS[::-1])), LABELS[::-1]).fingerprint(),
    ]
    assert len({base, *others}) == 4


def test_bytes_that_are_no_image_fail_at_load(ready):
    with pytest.raises(UserError, match=r"set/train\.parquet, row 1 cannot be decoded \(not a picture file"):
        ready(cells([png(PIXELS[0]), b"hello"]), [0, 1])


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_cut_short_fails_at_load(ready, kind):
    blob = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    with pytest.raises(UserError, match=r"set/train\.parquet, row 1 cannot be decoded"):
        ready(cells([png(PIXELS[0]), blob[: len(blob) // 2]]), [0, 1])


def test_wide_channels_and_huge_images_are_refused(ready, monkeypatch):
    """PIL would cut 16 bits off at 255: nearly white."""
    with pytest.raises(UserError, match=r"row 1 cannot be decoded \(mode I;16, expected at most 8 bits"):
        ready(cells([png(PIXELS[0]), png(np.full((4, 4), 30_000, np.uint16))]), [0, 1])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.raises(UserError, match=r"row 0 cannot be decoded \(Image size"):
        ready(cells([png(np.zeros((4, 5, 3), np.uint8))] * 2), [0, 1])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (
            pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b.png"}]),
            "row 1: 'img' holds no image bytes",
        ),
        (pa.array([None, None], pa.binary()), "row 0: 'img' holds no image bytes"),
        (pa.array(["a.png", "b.png"]), "'img' holds string, expected picture files"),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 4, 4, 3), np.float32)), "'img' holds .*tensor"),
    ],
)
def test_columns_that_are_no_images(ready, images, expected):
    with pytest.raises(UserError, match=expected):
        ready(images, [0, 1])


def test_no_processor_and_too_few_classes(source, folder):
    task = ImageClassification("t", source, "img", "y", 3)
    rows = {"img": cells([png(PIXELS[0])]), "y": [0]}
    task.load(folder(train=rows, validation=rows))
    with pytest.raises(UserError, match="no image processor"):
        task.prepare(None)
    with pytest.raises(UserError, match="num_labels=1"):
        ImageClassification("t", source, "img", "y", 1)


@pytest.mark.shared
def test_real_cifar10(shared, processor):
    source = HubData("uoft-cs/cifar10", None, "cifar10_jpeg", {"train": "test", "validation": "train"})
    task = ImageClassification("cifar10", source, "img", "label", 10)
    task.load(str(shared / "data"))
    task.prepare(processor)
    assert task.num_examples == 10_000
    assert task.collate([task.train[i] for i in range(3)])["pixel_values"].shape == (3, 3, 8, 8)


ATTRIBUTES = {
    "bald": [True, False, False, True, False],
    "young": [1, 1, 0, 0, 1],
    "smiling": [False, False, True, True, True],
}


@pytest.fixture
def faces(source, folder, processor):
    def of(**changes):
        task = ImageClassification("t", source, "img", list(ATTRIBUTES), 3)
        rows = {"img": cells(map(png, PIXELS)), **ATTRIBUTES, **changes}
        task.load(folder(train=rows, validation=rows))
        task.prepare(processor)
        return task

    return of


def test_attributes_are_learned_each_by_itself(faces, vit):
    """The loss of a row is the sum of its labels' binary cross-entropies (SETTINGS: CelebA)."""
    task = faces()
    batch = task.collate([task.train[i] for i in range(5)])
    true = torch.tensor([[float(each[i]) for each in ATTRIBUTES.values()] for i in range(5)])
    assert torch.equal(batch["labels"], true)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        said = vit(pixel_values=batch["pixel_values"]).logits.sigmoid()
        expected = -(true * said.log() + (1 - true) * (1 - said).log()).sum(1)
        torch.testing.assert_close(task.losses(vit, batch), expected, rtol=1e-9, atol=0)
    parts = [{name: values[part] for name, values in batch.items()} for part in (slice(0, 2), slice(2, 5))]
    found = task.evaluate(vit, parts)
    assert found["accuracy"] == pytest.approx(((said > 0.5) == (true > 0.5)).double().mean().item(), abs=1e-12)
    assert found["loss"] == pytest.approx(expected.mean().item())
    assert 0 < found["accuracy"] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"young": [1, 1, 2, 0, 1]}, r"row 2: 'young' is 2, expected true, false, 0 or 1"),
        ({"young": [1, 1, -1, 0, 1]}, r"row 2: 'young' is -1"),
        ({"young": [True, None, True, True, True]}, r"row 1: 'young' is null"),
        ({"young": ["yes"] * 5}, r"row 0: 'young' is 'yes'"),
        ({"young": [1.0] * 5}, r"row 0: 'young' is 1\.0"),
    ],
)
def test_attributes_that_are_no_truth_values(faces, changes, words):
    with pytest.raises(UserError, match=words):
        faces(**changes)


def test_attributes_and_their_number(source):
    with pytest.raises(UserError, match=r"task\.label names 2 columns, expected num_labels=3"):
        ImageClassification("t", source, "img", ["bald", "young"], 3)
    with pytest.raises(UserError, match=r"task\.label names a column twice"):
        ImageClassification("t", source, "img", ["bald", "young", "bald"], 3)


def test_one_attribute_changes_the_fingerprint(faces):
    assert faces().fingerprint() != faces(young=[1, 1, 0, 1, 1]).fingerprint()


def test_pictures_that_are_no_pictures_or_cut_short_are_skipped(source, folder, processor):
    """A file that is cut short shows when it is decoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    blobs = [png(each) for each in pixels]
    blobs[1], blobs[2] = b"no picture", blobs[2][: len(blobs[2]) // 2]
    rows = {"img": cells(blobs), "y": [0, 1, 2, 1]}
    root = folder(train=rows, validation=rows)
    task = ImageClassification("t", replace(source, on_error="skip"), "img", "y", 3)
    task.load(root)
    task.prepare(processor)
    assert task.num_examples == 2
    assert [task.train[i]["label"] for i in range(2)] == [0, 1]
    assert task.selection.startswith("2 rows of train")
    with pytest.raises(UserError, match=r"row 1 cannot be decoded \(not a picture file"):
        ImageClassification("t", source, "img", "y", 3).load(root)


def test_resizing_on_the_device_does_what_the_processor_does(source, folder):
    """But for PIL's rounding, and its clipping between two bicubic passes, which noise would show, and pictures do not."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), dtype=np.uint8)
    smooth = np.asarray([Image.fromarray(each).resize((40, 24), Image.Resampling.BICUBIC) for each in noise])
    bilinear, bicubic = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    small = noise[:, :5, :6]
    for images, resample, most in ((noise, bilinear, 2), (small, bilinear, 2), (smooth, bilinear, 2), (smooth, bicubic, 3)):
        rows = {"img": cells(map(png, images)), "y": [0, 1, 2]}
        root = folder(train=rows, validation=rows)
        processor = ViTImageProcessorPil(
            size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6], image_std=[0.25, 0.5, 0.2], resample=resample
        )
        made = {}
        for where in ("host", "device"):
            task = ImageClassification("t", source, "img", "y", 3, resize=where)
            task.load(root)
            task.prepare(processor)
            made[where] = task._ready(task.collate([task.train[i] for i in range(3)]))["pixel_values"]
        assert made["device"].shape == (3, 3, 8, 8)
        steps = (made["device"] - made["host"]).abs() * 255 * torch.tensor([0.25, 0.5, 0.2]).view(1, 3, 1, 1)
        assert steps.max() < most
        assert steps.median() < 1


def test_training_by_images_that_are_resized_on_the_device(source, folder, processor, vit):
    """What the loss and the metrics see is resized, and a row hangs on itself alone."""
    rows = {"img": cells(map(png, PIXELS)), "y": LABELS}
    root = folder(train=rows, validation=rows)
    losses, scores = {}, {}
    for where in ("host", "device"):
        task = ImageClassification("t", source, "img", "y", 3, resize=where)
        task.load(root)
        task.prepare(processor)
        batch = task.collate([task.train[i] for i in range(5)])
        losses[where] = task.losses(vit.float(), batch)
        scores[where] = task.evaluate(vit, [task.collate([task.validation[i]]) for i in range(5)])
    torch.testing.assert_close(losses["device"], losses["host"], rtol=1e-5, atol=1e-6)  # 8 x 8 as they are
    assert scores["device"] == pytest.approx(scores["host"], rel=1e-5)


def test_images_of_several_sizes_need_the_host(source, folder, processor):
    rows = {"img": cells([png(PIXELS[0]), png(PIXELS[1, :6])]), "y": [0, 1]}
    task = ImageClassification("t", source, "img", "y", 3, resize="device")
    task.load(folder(train=rows, validation=rows))
    with pytest.raises(
        UserError, match=r"row 1: an image of 8 x 6 pixels, expected 8 x 8 as in row 0 for task\.resize=device"
    ):
        task.prepare(processor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"shortest_edge": 8}}, "size={'shortest_edge': 8}"),
        ({"do_resize": False}, "do_resize=false"),
        ({"resample": Image.Resampling.LANCZOS}, "resample=1"),
    ],
)
def test_processors_that_do_something_else_need_the_host(source, folder, processor, changes, words):
    for name, value in changes.items():
        setattr(processor, name, value)
    task = ImageClassification("t", source, "img", "y", 3, resize="device")
    rows = {"img": cells(map(png, PIXELS)), "y": LABELS}
    task.load(folder(train=rows, validation=rows))
    with pytest.raises(UserError, match=words):
        task.prepare(processor)


def test_another_place_to_resize_than_host_and_device(source):
    with pytest.raises(UserError, match=r"Unknown task\.resize=gpu: expected host or device"):
        ImageClassification("t", source, "img", "y", 3, resize="gpu")
