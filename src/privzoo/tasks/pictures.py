"""Picture files as bytes: opened, decoded, and what is said where they cannot be."""

import io

import pyarrow as pa
from PIL import Image

from privzoo.errors import UserError

BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for bad bytes


def open_image(raw: pa.Buffer, where: str, row: int) -> Image.Image:
    """The image, its header read and its pixels not yet.

    Raises:
        UserError: the bytes are not a picture file.
    """
    try:
        return Image.open(io.BytesIO(raw))
    except Image.UnidentifiedImageError as error:  # its own message shows an address in memory
        raise _not_an_image(where, row, "not a picture file that PIL knows") from error
    except BROKEN_IMAGE as error:
        raise _not_an_image(where, row, str(error)) from error


def decoded(image: Image.Image, where: str, row: int) -> Image.Image:
    """The image in RGB.

    Raises:
        UserError: its bytes are damaged.
    """
    try:
        return image.convert("RGB")
    except BROKEN_IMAGE as error:
        raise _not_an_image(where, row, str(error)) from error


def _not_an_image(where: str, row: int, reason: str) -> UserError:
    return UserError(f"{where}, row {row} cannot be decoded ({reason}): replace the image or leave the row out.")
