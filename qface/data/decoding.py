"""From encoded images to pixels."""

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

# What Pillow raises for a damaged file depends on the format and on where the damage lies.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, LimitError)

# Pillow goes by content, not by name: it would run Ghostscript over EPS, and its readers of rare formats raise more
# than UNREADABLE where a file is damaged.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # MPO is opened as JPEG

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that bring a photo upright, by EXIF's orientation."""


def size_of(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        ValueError: it is 16-bit gray. Damage and other formats raise what :data:`UNREADABLE` lists.
    """
    with opened(file) as image:
        width, height = image.size
        return width, height


@contextmanager
def opened(file: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """The image in ``file``, whose pixels are not read yet.

    16-bit gray is refused: Pillow clips it when it converts it to bytes, to white images. 16-bit color it scales.

    Raises:
        LimitError: it has more pixels than :mod:`qface.limits` allows in a photo.
        ValueError: it is 16-bit gray. Damage and other formats raise what :data:`UNREADABLE` lists.
    """
    with Image.open(file, formats=_FORMATS) as image:
        check("photo", image.width * image.height, "an image" if isinstance(file, io.BytesIO) else str(file))
        _check_depth(image)
        yield image


def _check_depth(image: Image.Image) -> None:
    if image.mode.startswith("I"):
        raise ValueError("it is 16-bit gray, not 8-bit")


def upright(image: Image.Image) -> Image.Image:
    """``image`` in RGB, turned as its camera says, which is what OpenCV reads."""
    turn = _TURNS.get(_orientation(image))
    return (image if turn is None else image.transpose(turn)).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever Pillow raises for tags that are damaged: the pixels may be well
        return None


def decode(content: Path | bytes | bytearray, resize: bool = False) -> npt.NDArray[np.uint8]:
    """The pixels of a 112x112 crop, uint8 [112, 112, 3] in RGB, turned as its camera says.

    Args:
        content: the encoded image.
        resize: bring squares of another size to 112x112, bilinearly.

    Raises:
        ValueError: it is of another size, or 16-bit gray. Damage and other formats raise what :data:`UNREADABLE` lists.
    """
    with opened(content if isinstance(content, Path) else io.BytesIO(content)) as image:
        if resize and image.width == image.height != CROP_SIZE:
            smaller = upright(image).resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BILINEAR)
            return np.asarray(smaller, dtype=np.uint8)
        if image.size != (CROP_SIZE, CROP_SIZE):
            raise ValueError(f"it is {image.size[0]}x{image.size[1]}, not {CROP_SIZE}x{CROP_SIZE}")
        return np.asarray(upright(image), dtype=np.uint8)


def stack_crops(crops: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """Crops [112, 112, 3] as one batch, uint8 [len(crops), 3, 112, 112]; there may be none."""
    batch = np.array(crops, np.uint8).reshape(len(crops), CROP_SIZE, CROP_SIZE, 3)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
