"""InsightFace's verification sets, ``lfw.bin``, ``cfp_fp.bin``, ``agedb_30.bin`` and others.

Each is a pickle of two lists: encoded images, two for each pair, and whether the two show one person. It is read
without running what a pickle may ask for: of all that it may name, only what rebuilds bytes and arrays is known here.
Folds are as InsightFace's: ten runs of pairs in the order of the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qface.data.decoding import UNREADABLE, decode, stack_crops
from qface.data.pairs import PairedImages, ResolvedPairs
from qface.errors import ImagesError, PairsError, one_line
from qface.pickles import check_pickle

__all__ = ["VerificationBin"]

_FOLDS = 10
_NUMPY = {"_reconstruct": "numpy._core.multiarray", "scalar": "numpy._core.multiarray"}


class VerificationBin(PairedImages):
    """The 112x112 crops of a ``.bin`` file, two for each of its pairs; who they show is not known.

    Args:
        path: the file.

    Attributes:
        path: the file.
        pairs: which images to compare, and in which fold.

    Raises:
        ImagesError: the file is missing or damaged, or asks for more than bytes, numbers and arrays.
        PairsError: it does not hold two images for each pair.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._images, same = _read(self.path)
        if len(same) == 0 or len(self._images) != 2 * len(same):
            raise PairsError(
                f"{self.path} holds {len(self._images)} images for {len(same)} pairs, not two for each: fetch it again"
            )
        first = 2 * np.arange(len(same), dtype=np.int64)
        self.pairs = ResolvedPairs(first, first + 1, same, _folds(len(same)), dropped=0)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: one of them is damaged or not 112x112; its number is named.
        """
        crops = [self._decode(index) for index in indices]
        return stack_crops(crops)

    def _decode(self, index: int) -> npt.NDArray[np.uint8]:
        try:
            return decode(self._images[index])
        except UNREADABLE as error:
            raise ImagesError(f"image {index} of {self.path} cannot be read: {one_line(error)}") from error


def _folds(pairs: int) -> npt.NDArray[np.int64]:
    """Ten runs, of which the first are one longer where they do not come out even."""
    sizes = [pairs // _FOLDS + (fold < pairs % _FOLDS) for fold in range(_FOLDS)]
    return np.repeat(np.arange(_FOLDS, dtype=np.int64), sizes)


def _read(path: Path) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    try:
        with path.open("rb") as file:
            check_pickle(file)
            content = _Unpickler(file, encoding="bytes").load()
        images, same = content
        return [_as_bytes(image) for image in images], np.array([_as_flag(flag) for flag in same], np.bool_)
    except Exception as error:  # damaged bytes may make the unpickler raise anything
        raise ImagesError(
            f"{path} cannot be read as a verification set of InsightFace ({one_line(error, 200)}): fetch it again"
        ) from error


def _as_bytes(image: object) -> bytes:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.tobytes()
    if isinstance(image, bytes):
        return image
    raise ValueError(f"an image is bytes, not {type(image).__name__}")


def _as_flag(flag: object) -> bool:
    if isinstance(flag, (bool, int, np.bool_, np.integer)) and flag in (0, 1):
        return bool(flag)
    raise ValueError(f"a pair is of one person or not, and not {flag!r}")


class _Unpickler(pickle.Unpickler):
    """One that knows arrays, and no other function or class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        if module.split(".")[0] == "numpy":
            return _numpy_builder(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 writes bytes as, for protocols below 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _numpy_builder(module: str, name: str) -> Callable[..., Any]:
    if name in ("ndarray", "dtype"):
        return getattr(np, name)  # type: ignore[no-any-return]
    if name in _NUMPY:
        return getattr(import_module(_NUMPY[name]), name)  # type: ignore[no-any-return]
    raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
