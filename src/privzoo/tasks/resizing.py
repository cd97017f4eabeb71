"""What an image processor does to pixels, done to a whole micro-batch where the model is."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional

from privzoo.errors import UserError

MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}
OTHER_STEPS = ("do_center_crop", "do_pad", "do_reduce_labels", "do_flip_channel_order")


@dataclass(frozen=True)
class OnDevice:
    """Resizing, scaling and normalising, each image by itself.

    PIL rounds to whole numbers between its two passes and after them, and torch does not: a pixel differs by about a 255th
    of the range before normalisation, by more where bicubic passes overshoot the range.

    Args:
        size: (height, width) that the model takes.
        mode: of `torch.nn.functional.interpolate`, with antialiasing.
        scale: that numbers of 0..255 are multiplied by.
        mean, std: by channel, after that.
    """

    size: tuple[int, int]
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def as_by(cls, processor: Any) -> "OnDevice":
        """The steps of an image processor of transformers.

        Raises:
            UserError: it does something else, too, or resizes in another way.
        """
        size: dict[str, int] = dict(getattr(processor, "size", None) or {})
        resample: Any = getattr(processor, "resample", None)
        other = [name for name in OTHER_STEPS if getattr(processor, name, None)]
        if set(size) != {"height", "width"} or resample not in MODES or getattr(processor, "crop_pct", None):
            other.append(f"size={size} with resample={resample}")
        if other or not getattr(processor, "do_resize", False):
            raise UserError(
                f"The model's image processor ({', '.join(other) or 'do_resize=false'}) does what task.resize=device "
                "cannot: set task.resize=host."
            )
        normalises = bool(getattr(processor, "do_normalize", False))
        return cls(
            (size["height"], size["width"]),
            MODES[resample],
            float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0,
            tuple(processor.image_mean) if normalises else (0.0,) * 3,
            tuple(processor.image_std) if normalises else (1.0,) * 3,
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (R, 3, H, W) to float32 (R, 3, height, width)."""
        values = pixels.float()
        if values.shape[-2:] != self.size:
            values = functional.interpolate(values, self.size, mode=self.mode, antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(each, device=values.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (values * self.scale - mean) / std
