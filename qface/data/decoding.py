"""Decoding of image files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

from qface.errors import LimitError
from qface.limits import check
from qface.preprocessing import CROP_SIZE

__all__ = ["UNREADABLE", "decode", "opened", "size_of", "stack_crops", "upright"]

# Pillow raises different exceptions for damaged files, depending on the format and the place of the damage.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, LimitError)

# Pillow detects the format by content. Other formats are refused: EPS would run Ghostscript, and readers of rare
# formats raise exceptions outside UNREADABLE for damaged files.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # JPEG includes MPO

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes a photo upright, by EXIF orientation."""


def size_of(file: Path) -> tuple[int, int]:
    """Return (width, height) in pixels, read from the file header only.

    Raises:
        ValueError: the image is 16-bit grayscale. Damaged files and other formats raise one of :data:`UNREADABLE`.
    """
    with opened(file) as image:
        width, height = image.size
        return width, height


@contextmanager
def opened(file: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels.

    16-bit grayscale is refused, since Pillow clips it to white when converting to 8 bits; 16-bit color is scaled.

    Raises:
        LimitError: the image has more pixels than the limit ``photo`` of :mod:`qface.limits`.
        ValueError: the image is 16-bit grayscale. Damaged files and other formats raise one of :data:`UNREADABLE`.
    """
    with Image.open(file, formats=_FORMATS) as image:
        check("photo", image.width * image.height, "an image" if isinstance(file, io.BytesIO) else str(file))
        _check_depth(image)
        yield image


def _check_depth(image: Image.Image) -> None:
    if image.mode.startswith("I"):
        raise ValueError("it is 16-bit grayscale, not 8-bit")


def upright(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB, rotated by its EXIF orientation, as OpenCV does."""
    turn = _TURNS.get(_orientation(image))
    return (image if turn is None else image.transpose(turn)).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises various exceptions for damaged tags; the pixels may be intact
        return None


def decode(content: Path | bytes | bytearray, resize: bool = False) -> npt.NDArray[np.uint8]:
    """Decode a 112x112 crop to uint8 [112, 112, 3] in RGB, rotated by its EXIF orientation.

    Args:
        content: path or encoded bytes of the image.
        resize: True to resize square images of other sizes to 112x112 bilinearly.

    Raises:
        ValueError: the image has another size, or is 16-bit grayscale. Damaged files and other formats raise one of
            :data:`UNREADABLE`.
    """
    with opened(content if isinstance(content, Path) else io.BytesIO(content)) as image:
        if resize and image.width == image.height != CROP_SIZE:
            smaller = upright(image).resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BILINEAR)
            return np.asarray(smaller, dtype=np.uint8)
        if image.size != (CROP_SIZE, CROP_SIZE):
            raise ValueError(f"it is {image.size[0]}x{image.size[1]}, not {CROP_SIZE}x{CROP_SIZE}")
        return np.asarray(upright(image), dtype=np.uint8)


def stack_crops(crops: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """Stack crops uint8 [112, 112, 3] to a batch uint8 [len(crops), 3, 112, 112], which may be empty."""
    batch = np.array(crops, np.uint8).reshape(len(crops), CROP_SIZE, CROP_SIZE, 3)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
