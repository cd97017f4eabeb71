"""Picture files as bytes: opened, decoded, and what is said where they cannot be."""

import io
import warnings

import pyarrow as pa
from PIL import Image

from privzoo.errors import UserError

# What PIL raises for bad bytes.
BROKEN_IMAGE = (
    OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
WIDE = ("I", "F")  # modes of more than 8 bits a channel begin so; PIL would cut values off in RGB


def open_image(raw: pa.Buffer, where: str, row: int) -> Image.Image:
    """The image, its header read and its pixels not yet.

    Raises:
        UserError: the bytes are not a picture file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(raw))
    except Image.UnidentifiedImageError as error:  # its own message shows an address in memory
        raise _not_an_image(where, row, "not a picture file that PIL knows") from error
    except BROKEN_IMAGE as error:
        raise _not_an_image(where, row, str(error)) from error


def decoded(image: Image.Image, where: str, row: int) -> Image.Image:
    """The image in RGB.

    Raises:
        UserError: its bytes are damaged, or it has more than 8 bits a channel.
    """
    if image.mode.startswith(WIDE):
        raise _not_an_image(where, row, f"mode {image.mode}, expected at most 8 bits a channel")
    try:
        return image.convert("RGB")
    except BROKEN_IMAGE as error:
        raise _not_an_image(where, row, str(error)) from error


def _not_an_image(where: str, row: int, reason: str) -> UserError:
    return UserError(f"{where}, row {row} cannot be decoded ({reason}): replace the image or leave the row out.")


def require_one_size(images: pa.ChunkedArray, where: str) -> None:
    """Raises UserError for the first image whose size is not that of the first one, by their headers."""
    if isinstance(images.type, pa.FixedShapeTensorType):
        return
    sizes = (open_image(cell.as_buffer(), where, row).size for row, cell in enumerate(images))
    first = next(sizes)
    for row, size in enumerate(sizes, start=1):
        if size != first:
            raise UserError(
                f"{where}, row {row}: an image of {size[0]} x {size[1]} pixels, expected {first[0]} x {first[1]} as in "
                "row 0 for task.resize=device: set it to host."
            )
