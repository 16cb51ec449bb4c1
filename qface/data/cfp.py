"""CFP, Celebrities in Frontal-Profile (http://www.cfpw.io): image lists and the splits FF and FP.

::

    Data/Images/001/frontal/01.jpg ...
    Protocol/Pair_list_F.txt       number and path of each frontal image
    Protocol/Pair_list_P.txt       number and path of each profile image
    Protocol/Split/FP/01/same.txt  genuine pairs of fold 1: 'frontal,profile' image numbers
    Protocol/Split/FP/01/diff.txt  impostor pairs of fold 1; pairs of FF are two frontal images

Each split has ten folds. The images must be aligned crops; :func:`qface.align` writes them from ``Data`` under the same
names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qface.data.decoding import UNREADABLE, decode, stack_crops
from qface.data.folders import EXTENSIONS, not_allowed
from qface.data.images import named_content
from qface.data.pairs import PairedImages, ResolvedPairs
from qface.data.text_lines import numbered_lines, whole_number
from qface.errors import ImagesError, PairsError, one_line

__all__ = ["CfpSplit", "is_cfp_split"]

_LISTS = {"FF": ("F", "F"), "FP": ("F", "P")}
"""Image lists of the first and the second number of a pair, by split."""


def is_cfp_split(path: Path) -> bool:
    """True if ``path`` is the folder ``Protocol/Split/FF`` or ``Protocol/Split/FP`` of CFP."""
    if not os.path.isdir(path):  # checked first, since resolve raises for invalid names
        return False
    path = path.resolve()  # it may be ``.``
    return path.name in _LISTS and os.path.exists(path.parent.parent / "Pair_list_F.txt")


class CfpSplit(PairedImages):
    """Images and pairs of a CFP split, without identity labels.

    Args:
        path: the folder ``Protocol/Split/FF`` or ``Protocol/Split/FP``.

    Attributes:
        path: the folder.
        pairs: the verification pairs and their folds.
        paths: the images of the pairs.

    Raises:
        PairsError: ``path`` is not such a folder, or a list is malformed.
        ImagesError: a list or an image is missing, or a folder cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        if not is_cfp_split(Path(path)):
            raise PairsError(f"{path} is not a split of CFP: pass its folder Protocol/Split/FF or Protocol/Split/FP")
        self.path = Path(path).resolve()
        protocol = self.path.parent.parent
        images = {name: _listed(protocol / f"Pair_list_{name}.txt") for name in set(_LISTS[self.path.name])}
        numbers, same, fold = _numbers(self.path)
        sides = [
            _look_up(self.path, images[name], [pair[side] for pair in numbers])
            for side, name in enumerate(_LISTS[self.path.name])
        ]
        names = sorted({*sides[0], *sides[1]})
        index = {name: position for position, name in enumerate(names)}
        self.paths = [_on_disk(protocol.parent / name) for name in names]
        first, second = (np.array([index[name] for name in side], np.int64) for side in sides)
        self.pairs = ResolvedPairs(first, second, same, fold, dropped=0)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: an image is damaged or not 112x112; the message names it.
        """
        crops = [_decode(self.paths[index]) for index in indices]
        return stack_crops(crops)

    def content(self, index: int) -> bytes:
        """Return name and bytes of the file at ``index``.

        Raises:
            ImagesError: it cannot be read.
        """
        path = self.paths[index]
        return named_content(path, path.relative_to(self.path.parents[2]).as_posix())


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return decode(path)
    except UNREADABLE as error:
        raise ImagesError(f"{path} cannot be read as a crop ({one_line(error)}): align the photos first") from error


def _listed(path: Path) -> dict[int, str]:
    """Read an image list: path relative to CFP's folder by image number."""
    images = {}
    for number, line in numbered_lines(path):
        fields = line.split(maxsplit=1)
        key = whole_number(fields[0])
        _, data, name = fields[-1].strip().replace("\\", "/").partition("Data/")
        if len(fields) != 2 or key is None or not data or ".." in name.split("/"):
            raise PairsError(f"{path}, line {number}: expected 'number ../Data/Images/...', got {line.strip()!r}")
        images[key] = data + name
    return images


def _numbers(split: Path) -> tuple[list[list[int]], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return the image numbers, genuine flag and fold of each pair."""
    numbers: list[list[int]] = []
    same: list[bool] = []
    fold: list[int] = []
    for position, folder in enumerate(_folds(split)):
        for file, is_same in (("same.txt", True), ("diff.txt", False)):
            for number, line in numbered_lines(folder / file):
                one, other = (whole_number(field.strip()) for field in line.partition(",")[::2])
                if one is None or other is None:
                    raise PairsError(f"{folder / file}, line {number}: expected 'number,number', got {line.strip()!r}")
                numbers.append([one, other])
                same.append(is_same)
                fold.append(position)
    if not numbers:
        raise PairsError(f"{split} has no pairs: expected folders 01 to 10 with same.txt and diff.txt")
    return numbers, np.array(same, np.bool_), np.array(fold, np.int64)


def _folds(split: Path) -> list[Path]:
    try:
        return sorted(folder for folder in split.iterdir() if folder.name.isdecimal() and folder.is_dir())
    except OSError as error:
        raise not_allowed(error) from error


def _look_up(split: Path, images: dict[int, str], numbers: Sequence[int]) -> list[str]:
    unknown = [number for number in numbers if number not in images]
    if unknown:
        raise PairsError(
            f"{len(unknown)} image numbers in {split} are not in the image lists (first: {unknown[0]}): "
            "restore the lists"
        )
    return [images[number] for number in numbers]


def _on_disk(path: Path) -> Path:
    """Return the existing file ``path``, also with another image extension."""
    for candidate in (path, *map(path.with_suffix, sorted(EXTENSIONS))):
        if os.path.exists(candidate):
            return candidate
    raise ImagesError(f"there is no image {path}: write CFP's aligned Data folder there with qface align")
