"""From encoded images to pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from qface.preprocessing import CROP_SIZE

__all__ = ["UNREADABLE", "decode", "opened", "size_of", "stack_crops"]

# What Pillow raises for a damaged file depends on the format and on where the damage lies.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def size_of(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        ValueError: it has more than 8 bits a channel. Damage raises what :data:`UNREADABLE` lists.
    """
    with opened(file) as image:
        width, height = image.size
        return width, height


@contextmanager
def opened(file: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """The image in ``file``, whose pixels are not read yet.

    16-bit and float pixels are refused: Pillow clips them when it converts them to bytes, to white images.

    Raises:
        ValueError: it has more than 8 bits a channel. Damage raises what :data:`UNREADABLE` lists.
    """
    with Image.open(file) as image:
        _check_depth(image)
        yield image


def _check_depth(image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        raise ValueError("it has more than 8 bits a channel")


def decode(content: Path | bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a 112x112 crop, uint8 [112, 112, 3] in RGB.

    Raises:
        ValueError: it is of another size, or has more than 8 bits a channel. Damage raises what :data:`UNREADABLE`
            lists.
    """
    with opened(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        if image.size != (CROP_SIZE, CROP_SIZE):
            raise ValueError(f"it is {image.size[0]}x{image.size[1]}, not {CROP_SIZE}x{CROP_SIZE}")
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def stack_crops(crops: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """Crops [height, width, 3] as one batch, uint8 [len(crops), 3, height, width]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
