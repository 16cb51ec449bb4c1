"""InsightFace's verification sets, such as ``lfw.bin``, ``cfp_fp.bin`` and ``agedb_30.bin``.

A file is a pickle of two lists: encoded images, two per pair, and flags for genuine pairs. It is read without executing
code from the pickle (:mod:`qface.pickles`). As in InsightFace, the folds are ten consecutive parts of the
file. If a part had only genuine or only impostor pairs, for example in files that list genuine pairs first, both kinds
are split separately.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qface.data.decoding import UNREADABLE, decode, opened, stack_crops
from qface.data.pairs import PairedImages, ResolvedPairs, folds_of_each_kind
from qface.errors import ImagesError, LimitError, PairsError, one_line
from qface.limits import named
from qface.pickles import PickledArray, read_pickle
from qface.preprocessing import CROP_SIZE

__all__ = ["VerificationBin"]

_LOGGER = logging.getLogger("qface")

_FOLDS = 10


class VerificationBin(PairedImages):
    """112x112 crops and pairs of a ``.bin`` file, without identity labels.

    Square images of another size are resized with a warning.

    Args:
        path: the file.

    Attributes:
        path: the file.
        pairs: the verification pairs and their folds.

    Raises:
        ImagesError: the file is missing or damaged, or has other objects than bytes, numbers and arrays.
        LimitError: it exceeds a limit of :mod:`qface.limits`.
        PairsError: it does not have two images for each pair.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._images, same = _read(self.path)
        if len(same) == 0 or len(self._images) != 2 * len(same):
            raise PairsError(
                f"{self.path} has {len(self._images)} images for {len(same)} pairs, not two per pair: download it again"
            )
        first = 2 * np.arange(len(same), dtype=np.int64)
        self.pairs = ResolvedPairs(first, first + 1, same, _folds(same), dropped=0)
        self._say_size()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: an image is damaged or not square; the message names its number.
        """
        crops = [self._decode(index) for index in indices]
        return stack_crops(crops)

    def content(self, index: int) -> bytes:
        """Return the encoded image at ``index``."""
        return bytes(self._images[index])

    def _say_size(self) -> None:
        try:
            with opened(io.BytesIO(self._images[0])) as image:
                width, height = image.size
        except UNREADABLE:  # reported later, when the image is read
            return
        if width == height != CROP_SIZE:
            _LOGGER.warning(
                "%s has images of %dx%d pixels, which are resized to %dx%d: check that they are aligned as for ArcFace",
                *(self.path, width, height, CROP_SIZE, CROP_SIZE),
            )

    def _decode(self, index: int) -> npt.NDArray[np.uint8]:
        try:
            return decode(self._images[index], resize=True)
        except UNREADABLE as error:
            raise ImagesError(f"image {index} of {self.path} cannot be read: {one_line(error)}") from error


def _folds(same: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return ten consecutive folds; split by kind of pair if a fold would have only one kind."""
    sizes = [len(same) // _FOLDS + (fold < len(same) % _FOLDS) for fold in range(_FOLDS)]
    runs = np.repeat(np.arange(_FOLDS, dtype=np.int64), sizes)
    mixed = all(len(np.unique(same[runs == fold])) == 2 for fold in range(_FOLDS))
    enough = min(np.count_nonzero(same), np.count_nonzero(~same)) >= _FOLDS
    return folds_of_each_kind(same) if enough and not mixed else runs


def _read(path: Path) -> tuple[list[bytes | bytearray], npt.NDArray[np.bool_]]:
    try:
        with named(path), path.open("rb") as file:
            images, same = _entries(read_pickle(file))
        return [_as_bytes(image) for image in _entries(images)], np.array([*map(_as_flag, _entries(same))], np.bool_)
    except LimitError:
        raise
    except Exception as error:  # the unpickler may raise any exception for damaged bytes
        raise ImagesError(
            f"{path} cannot be read as a verification set of InsightFace ({one_line(error, 200)}): download it again"
        ) from error


def _entries(listed: object) -> Sequence[Any]:
    if isinstance(listed, PickledArray):
        return listed.elements()
    if isinstance(listed, (list, tuple)):
        return listed
    raise ValueError(f"expected a list, got {type(listed).__name__}")


def _as_bytes(image: object) -> bytes | bytearray:
    if isinstance(image, PickledArray):
        return image.bytes()
    if isinstance(image, (bytes, bytearray)):
        return image
    raise ValueError(f"an image must be bytes, got {type(image).__name__}")


def _as_flag(flag: object) -> bool:
    if isinstance(flag, (bool, int, float, np.number, np.bool_)) and flag in (0, 1):
        return bool(flag)
    raise ValueError(f"a flag of a pair must be 0 or 1, got {flag!r}")
