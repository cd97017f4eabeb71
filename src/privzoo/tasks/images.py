"""Classification of images. Decoded with PIL, row by row, when a row is asked for."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError
from privzoo.tasks.base import Task, scoring
from privzoo.tasks.cells import Column
from privzoo.tasks.classification import class_logits, class_losses, evaluate_classes
from privzoo.tasks.data import HubData, ToyData
from privzoo.tasks.digest import content_digest
from privzoo.tasks.pictures import decoded, open_image, require_one_size
from privzoo.tasks.resizing import OnDevice
from privzoo.tasks.units import RowsOfUnits


class ImageClassification(Task):
    """A label for an image, or several that are true or false each by itself (the attributes of a face).

    With `views` above 1 the mean loss of several views of an image is learned (augmentation multiplicity, De et al. 2022).

    View 0 is the image as it is. Further ones are shifted by up to an eighth of its sides and mirrored or not, as a hash of
    the image itself says: an image that leaves changes no view of another, as a stream by numbers would. The same views come
    in every epoch. **All views of an image are one unit of privacy.** Validation images have one view.

    Args:
        name: as in the run record.
        data: where the rows come from.
        image: name of the image column (picture files as bytes, or uint8 arrays of one shape).
        label: name of the label column, integers in 0..num_labels-1; or the names of `num_labels` columns of truth values.
        num_labels: number of classes or of such columns, at least 2.
        views: of each training image.
        label_names: the classes in words.
        resize: "host" runs the model's image processor on every image when it is asked for; "device" sends images of one
            size as they are, and does the same to a whole micro-batch where the model is (see `OnDevice`).
    """

    kind = "image_classification"
    num_labels: int
    metrics = ("accuracy", "loss")
    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: HubData | ToyData,
        image: str,
        label: str | Sequence[str],
        num_labels: int,
        views: int = 1,
        label_names: Sequence[str] | None = None,
        resize: str = "host",
    ):
        if num_labels < 2:
            raise UserError(f"task.num_labels={num_labels}, expected at least 2: correct the task's yaml.")
        if not isinstance(label, str) and len(label) != num_labels:
            raise UserError(f"task.label names {len(label)} columns, expected num_labels={num_labels}: add or drop names.")
        if not isinstance(label, str) and len(set(label)) < len(label):
            raise UserError(f"task.label names a column twice, expected {len(label)} different ones: drop a name.")
        if not isinstance(label, str):
            self.problem_type = "multi_label_classification"
        if type(views) is not int or views < 1:
            raise UserError(f"Expected task.views={views} to be a whole number of at least 1.")
        if resize not in ("host", "device"):
            raise UserError(f"Unknown task.resize={resize}: expected host or device.")
        self._resize = resize
        self._on_device: OnDevice | None = None
        self.name, self.num_labels, self._views = name, num_labels, views
        self.label_names = list(label_names) if label_names is not None else None
        self._data, self._image, self._label = data, image, label if isinstance(label, str) else list(label)

    def load(self, data_root: str | None) -> None:
        """Every picture is decoded once, so that a broken one is found before any work."""
        if isinstance(self._label, str):
            labels = [Column(self._label, "label", self.num_labels)]
        else:
            labels = [Column(name, "flag") for name in self._label]
        columns = [Column(self._image, "image"), *labels]
        self._tables = {split: self._data.load(split, columns, data_root) for split in ("train", "validation")}
        self.count(self._tables["train"])
        self.selection = self._data.selection

    def fingerprint(self) -> str:
        where = "" if self._resize == "host" else f" {self._resize}"
        return content_digest(self._tables["train"], f"{self.kind} {self._image} {self._label} {self._views}{where}")

    def prepare(self, processor) -> None:
        """Images are decoded when they are asked for.

        Raises:
            UserError: the model has no image processor; with resize=device, one that does something else, or images are of
                several sizes.
        """
        if processor is None:
            raise UserError(
                f"the model has no image processor, but task {self.name} reads images: put its "
                f"preprocessor_config.json beside the model, or choose another model."
            )
        self._on_device = OnDevice.as_by(processor) if self._resize == "device" else None
        if self._on_device is not None:
            for split, table in self._tables.items():
                require_one_size(table[self._image], f"{self.name} ({split} split)")
        to_size = None if self._on_device else processor
        self.train, self.validation = (
            ImageRows(
                table[self._image], self._labels(table), to_size, f"{self.name} ({split} split)",
                self._views if split == "train" else 1,
            )
            for split, table in self._tables.items()
        )  # fmt: skip
        if self._views > 1 and self.rows_of_unit is not None:
            raise UserError("Expected task.views=1 beside owners: an owner's images are one unit already.")
        if self._views > 1:
            rows = len(self.train)
            self.rows_of_unit = RowsOfUnits(np.arange(rows) // self._views)

    def _labels(self, table: pa.Table) -> np.ndarray:
        """(N,) of integers, or (N, labels) of 0.0 and 1.0."""
        if isinstance(self._label, str):
            return table[self._label].to_numpy()
        return np.stack([table[name].to_numpy() for name in self._label], axis=1).astype(np.float32)

    def length(self, row: dict) -> int:
        """1: the processor brings all images to one size."""
        return 1

    def by_length(self, rows: Sequence[dict]) -> list[int]:
        """As they are, none decoded."""
        return list(range(len(rows)))

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """pixel_values: float32 (R, 3, height, width), or uint8 of the images' own size; labels: (R,), or float32
        (R, labels).
        """
        stacked = {"pixel_values": "pixel_values", "labels": "label"}
        return {name: torch.from_numpy(np.stack([row[key] for row in rows])) for name, key in stacked.items()}

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of training rows: a view's share in the mean over the views of its image."""
        losses = class_losses if isinstance(self._label, str) else attribute_losses
        return losses(class_logits(model, self._ready(batch)), batch) / self._views

    def _ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as the model takes it."""
        return batch if self._on_device is None else batch | {"pixel_values": self._on_device(batch["pixel_values"])}

    def evaluate(self, model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """accuracy (over all rows and labels), and the mean loss of a row."""
        ready = map(self._ready, loader)
        return evaluate_classes(model, ready)[0] if isinstance(self._label, str) else evaluate_attributes(model, ready)


def attribute_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross-entropy of each row, added up over its labels, (R,)."""
    return functional.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype), reduction="none").sum(1)


def evaluate_attributes(model: torch.nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """The share of right answers over all rows and labels, and the mean loss of a row."""
    rows, right, loss = 0, 0.0, 0.0
    with scoring(model):
        for batch in loader:
            logits = class_logits(model, batch)
            rows += len(logits)
            right += ((logits > 0) == (batch["labels"] > 0.5)).double().mean(1).sum().item()
            loss += attribute_losses(logits, batch).double().sum().item()
    assert rows, "evaluate was given no micro-batch"
    return {"accuracy": right / rows, "loss": loss / rows}


class ImageRows(Sequence[dict]):
    """Images as they are stored; `[i]` decodes an image and runs the processor on it; row i is view i % views of image
    i // views."""

    def __init__(self, images: pa.ChunkedArray, labels: np.ndarray, processor, where: str, views: int = 1):
        self._images, self._labels, self._processor, self._where = images, labels, processor, where
        self._views = views

    def __len__(self) -> int:
        return len(self._labels) * self._views

    def __getitem__(self, index):
        """pixel_values: float32 array (3, height, width), or without a processor uint8 as in the image; label: a number, or
        float32 (labels,).

        Raises:
            UserError: the image cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index, view = divmod(index, self._views)
        cell = self._images[index]
        if isinstance(cell, pa.FixedShapeTensorScalar):
            raw = cell.to_numpy().tobytes()
            image = Image.fromarray(cell.to_numpy()).convert("RGB")
        else:
            raw = cell.as_py()
            image = decoded(open_image(cell.as_buffer(), self._where, index), self._where, index)
        if view:
            image = changed(image, _view_stream(raw, view))
        if self._processor is None:
            return {"pixel_values": np.asarray(image).transpose(2, 0, 1), "label": self._labels[index]}
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"][0]
        return {"pixel_values": np.asarray(pixels, dtype=np.float32), "label": self._labels[index]}


def _view_stream(raw: bytes, view: int) -> np.random.Generator:
    """Of what happens to a view: it hangs on the image and the view's number alone, and is public."""
    digest = hashlib.blake2b(raw, key=b"privzoo views", digest_size=16).digest()
    return np.random.default_rng([int.from_bytes(digest, "big"), view])


def changed(image: Image.Image, stream: np.random.Generator) -> Image.Image:
    """The image shifted by up to an eighth of its sides, the edge mirrored into what is left free, and mirrored or not."""
    pixels = np.asarray(image)
    margins = [size // 8 for size in pixels.shape[:2]]
    padded = np.pad(pixels, [(margins[0], margins[0]), (margins[1], margins[1]), (0, 0)], mode="symmetric")
    top, left = (int(stream.integers(0, 2 * margin + 1)) for margin in margins)
    shifted = padded[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    return Image.fromarray(np.ascontiguousarray(shifted[:, ::-1] if stream.integers(0, 2) else shifted))
