"""Lists of verification pairs: CSV and the text formats of LFW, SLLFW, CALFW and CPLFW.

- LFW (http://vis-www.cs.umass.edu/lfw/#views): a header, then names and image numbers.
- SLLFW: two lines like ``Ann/Ann_0001.jpg`` per pair, which is genuine if the folders are equal.
- CALFW and CPLFW: two lines like ``Ann_0001.jpg 3`` per pair, which is genuine if the number is not 0.
- CSV: lines ``path,path,flag`` or ``path,path,flag,fold`` with an optional header, separated by commas, semicolons,
  tabs or spaces. The flag may be any of the first three fields: 1 is genuine, 0 or -1 impostor. Without the field
  ``fold``, all pairs are in one fold.
"""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from qface.data.folders import ImageFolder
from qface.data.identities import composed
from qface.data.images import IndexedImages
from qface.data.text_lines import numbered_lines, whole_number
from qface.errors import PairsError, one_line

__all__ = [
    "PairList",
    "PairedImages",
    "ResolvedPairs",
    "folds_of_each_kind",
    "read_lfw_pairs",
    "read_pairs",
    "resolve_pairs",
]

_FOLDS = 10  # for formats without folds

_FLAGS = {"1": True, "0": False, "-1": False, "1.0": True, "0.0": False, "true": True, "false": False}

_MOST_FIELDS = 4  # checked line by line: a list of long lines would fill the memory

LineT = TypeVar("LineT")


@dataclass(frozen=True, eq=False)
class PairList:
    """Verification pairs by image name.

    Args:
        path: the file of the list, for messages.
        first: first image of each pair, ``identity/file`` or ``file``, without extension.
        second: second image of each pair, likewise.
        same: bool [pairs], True for genuine pairs.
        fold: int64 [pairs], numbered from 0.
    """

    path: Path
    first: list[str]
    second: list[str]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, eq=False)
class ResolvedPairs:
    """Verification pairs by image index.

    Args:
        first: int64 [pairs], index of the first image.
        second: int64 [pairs], index of the second image.
        same: bool [pairs], True for genuine pairs.
        fold: int64 [pairs], fold numbers of the file.
        dropped: number of pairs left out because an identity is not selected.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]
    dropped: int

    def __len__(self) -> int:
        return len(self.first)


class PairedImages(IndexedImages):
    """Images with verification pairs.

    Attributes:
        path: the file or folder of the images.
        pairs: the pairs and their folds.
    """

    path: Path
    pairs: ResolvedPairs


def read_pairs(path: str | Path) -> PairList:
    """Read a list of pairs in any format of this module, recognized by its first line.

    Args:
        path: the text file.

    Returns:
        The pairs by image name.

    Raises:
        PairsError: the file cannot be read, a line is malformed, or the number of pairs differs from the header.
    """
    path = Path(path)
    _, first = next(numbered_lines(path, PairsError), (1, ""))
    delimiter = next((each for each in ",;\t" if each in first), None)
    if len(_fields(path, first, delimiter)) == 3 or delimiter in (",", ";"):
        return _read_flagged_pairs(path, delimiter)
    if "." not in first:
        return read_lfw_pairs(path)
    return _read_sllfw_pairs(path) if "/" in first else _read_calfw_pairs(path)


def _fields(path: Path, line: str, delimiter: str | None) -> list[str]:
    """Split a line at spaces if ``delimiter`` is None, else as CSV."""
    if delimiter is None:
        return line.split()
    try:
        return [field.strip() for field in next(csv.reader([line.strip()], delimiter=delimiter), [])]
    except csv.Error as error:
        raise PairsError(f"{path} has a line that is not CSV ({one_line(error)}): {line[:80]!r}") from error


def _read_flagged_pairs(path: Path, delimiter: str | None) -> PairList:
    """Read lines ``path path flag`` with an optional header."""
    rows = []
    for number, line in numbered_lines(path, PairsError):
        rows.append((number, line, _fields(path, line, delimiter)))
        if len(rows[-1][2]) > _MOST_FIELDS:
            raise PairsError(f"{path}, line {number}: expected 'path,path,flag,fold', got {line.strip()!r}")
    if not any(field.lower() in _FLAGS for field in rows[0][2]):
        rows = rows[1:]
    if not rows:
        raise PairsError(f"{path} has no pairs: expected lines 'path,path,flag' with a flag of 0 or 1")
    fold, rows = _folds_column(path, rows)
    columns = [at for at in (2, 0, 1) if all(len(row) == 3 and row[at].lower() in _FLAGS for _, _, row in rows)]
    if not columns:
        number, line, _ = next(
            (each for each in rows if len(each[2]) != 3 or each[2][2].lower() not in _FLAGS), rows[0]
        )
        raise PairsError(
            f"{path}, line {number}: expected 'path,path,flag' with a flag of 0 or 1, got {line.strip()!r}"
        )
    names = [[field for at, field in enumerate(row) if at != columns[0]] for _, _, row in rows]
    first, second = (
        [_stem(posixpath.normpath(name.replace("\\", "/"))) for name in side] for side in zip(*names, strict=True)
    )
    same = np.array([_FLAGS[row[columns[0]].lower()] for _, _, row in rows], np.bool_)
    return PairList(path, first, second, same, fold)


def _folds_column(
    path: Path, rows: list[tuple[int, str, list[str]]]
) -> tuple[npt.NDArray[np.int64], list[tuple[int, str, list[str]]]]:
    """Split off the fold column; rows without a fourth field are all in fold 0."""
    if len(rows[0][2]) != 4:
        return np.zeros(len(rows), np.int64), rows
    folds = [whole_number(fields[3]) if len(fields) == 4 else None for _, _, fields in rows]
    for (number, line, _), fold in zip(rows, folds, strict=True):
        if fold is None:
            raise PairsError(f"{path}, line {number}: expected 'path,path,flag,fold', got {line.strip()!r}")
    return np.array(folds, np.int64), [(number, line, fields[:3]) for number, line, fields in rows]


def _read_sllfw_pairs(path: Path) -> PairList:
    """Read two lines ``name/name_0001.jpg`` per pair."""
    lines = [(number, line.strip()) for number, line in numbered_lines(path, PairsError)]
    for number, line in lines:
        if line.count("/") != 1:
            raise PairsError(f"{path}, line {number}: expected 'name/name_0001.jpg', got {line!r}")
    files = [line for _, line in lines]
    return _of_files(path, files, [one.split("/")[0] == other.split("/")[0] for one, other in _twos(path, files)])


def _read_calfw_pairs(path: Path) -> PairList:
    """Read two lines ``name_0001.jpg number`` per pair; the number is 0 for impostor pairs."""
    files, numbers = [], []
    for number, line in numbered_lines(path, PairsError):
        fields = line.split()
        kind = whole_number(fields[-1])
        if len(fields) != 2 or kind is None:
            raise PairsError(f"{path}, line {number}: expected 'name_0001.jpg' and a number, got {line.strip()!r}")
        files.append(fields[0])
        numbers.append(kind)
    for pair, (one, other) in enumerate(_twos(path, numbers)):
        if one != other:
            raise PairsError(
                f"{path}: the two lines of pair {pair + 1} have different numbers, {one} and {other}: restore the file"
            )
    return _of_files(path, files, [one != 0 for one, _ in _twos(path, numbers)])


def _twos(path: Path, lines: Sequence[LineT]) -> list[tuple[LineT, LineT]]:
    if not lines or len(lines) % 2:
        raise PairsError(f"{path} has {len(lines)} lines, but needs two for each pair: restore the file")
    return list(zip(lines[::2], lines[1::2], strict=True))


def _of_files(path: Path, files: Sequence[str], same: Sequence[bool]) -> PairList:
    """Build a pair list from two ``files`` per pair."""
    stems = [_stem(file) for file in files]
    kinds = np.array(same, np.bool_)
    return PairList(path, stems[::2], stems[1::2], kinds, folds_of_each_kind(kinds))


def folds_of_each_kind(same: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Split genuine and impostor pairs separately into ten consecutive folds, int64 [pairs]."""
    fold = np.zeros(len(same), np.int64)
    for kind in (same, ~same):
        count = int(np.count_nonzero(kind))
        fold[kind] = np.arange(count) * _FOLDS // max(count, 1)
    return fold


def _stem(file: str) -> str:
    """Return ``file`` without its extension."""
    return file.rpartition(".")[0] or file


def read_lfw_pairs(path: str | Path) -> PairList:
    """Read LFW's format: header ``folds<TAB>n``, then n genuine and n impostor pairs per fold.

    A genuine pair is ``name<TAB>i<TAB>j``, an impostor pair ``name1<TAB>i<TAB>name2<TAB>j``. A header with the single
    number n (view 1) means one fold. Lines without tabs are split at spaces; blank lines are ignored.

    Args:
        path: the text file.

    Returns:
        The pairs by image name.

    Raises:
        PairsError: the file cannot be read, a line is malformed, or the number of pairs differs from the header.
    """
    path = Path(path)
    lines = list(numbered_lines(path, PairsError))
    folds, per_fold = _header(path, lines)
    pairs = lines[1:]
    if len(pairs) != 2 * folds * per_fold:
        raise PairsError(
            f"{path} has {len(pairs)} pairs, but its header says {2 * folds * per_fold} ({folds} x 2 x {per_fold}): "
            "correct the header or restore the file"
        )
    position = np.arange(len(pairs))
    same = position // per_fold % 2 == 0
    faces = [_faces(path, number, line, bool(is_same)) for (number, line), is_same in zip(pairs, same, strict=True)]
    return PairList(
        path=path,
        first=[first for first, _ in faces],
        second=[second for _, second in faces],
        same=same,
        fold=position // (2 * per_fold),
    )


def resolve_pairs(pairs: PairList, folder: ImageFolder) -> ResolvedPairs:
    """Find the images of ``pairs`` in ``folder``, with any image extension.

    Pairs with an identity that the folder does not select are left out and counted. Folds keep their numbers.

    Args:
        pairs: pairs by image name.
        folder: the images.

    Returns:
        The pairs by image index.

    Raises:
        PairsError: the list names identities and the folder is flat, or the reverse; or images are missing on disk
            (the message counts these pairs).
    """
    _check_layout(pairs, folder)
    index = _by_stem(folder)
    both = list(zip(map(composed, pairs.first), map(composed, pairs.second), strict=True))
    selected = set(map(composed, folder.names))
    _check_on_disk(pairs.path, both, folder, index)
    kept = np.array([all(_person(image) in selected or not selected for image in pair) for pair in both], np.bool_)
    remaining = [pair for pair, keep in zip(both, kept, strict=True) if keep]
    return ResolvedPairs(
        first=np.array([index[first] for first, _ in remaining], dtype=np.int64),
        second=np.array([index[second] for _, second in remaining], dtype=np.int64),
        same=pairs.same[kept],
        fold=pairs.fold[kept],
        dropped=int(np.count_nonzero(~kept)),
    )


def _by_stem(folder: ImageFolder) -> dict[str, int]:
    """Return the index of each image by its name without extension."""
    index: dict[str, int] = {}
    for number, path in enumerate(folder.paths):
        stem = composed(path.relative_to(folder.root).with_suffix("").as_posix())
        if stem in index:
            raise PairsError(f"{folder.paths[index[stem]]} and {path} differ only in extension: move one away")
        index[stem] = number
    return index


def _check_layout(pairs: PairList, folder: ImageFolder) -> None:
    names_people = "/" in pairs.first[0]
    if names_people and not folder.names:
        raise PairsError(
            f"{pairs.path} names identities, but {folder.root} has no subfolders: pass a folder with one subfolder per "
            "identity"
        )
    if folder.names and not names_people:
        raise PairsError(
            f"{pairs.path} names files, but {folder.root} has subfolders: pass the folder that contains the files"
        )


def _check_on_disk(path: Path, both: Sequence[tuple[str, str]], folder: ImageFolder, index: dict[str, int]) -> None:
    on_disk, selected = set(map(composed, folder.all_names)), set(map(composed, folder.names))

    def is_missing(image: str) -> bool:
        # The folder does not list images of identities that are not selected: only the identity can be checked.
        person = _person(image)
        looked_up = person in selected or not selected
        return (looked_up and image not in index) or (bool(on_disk) and person not in on_disk)

    broken = [(pair, image) for pair in both if (image := next(filter(is_missing, pair), None))]
    if broken:
        (first, second), missing = broken[0]
        raise PairsError(
            f"{len(broken)} of {len(both)} pairs in {path} name images that are not in {folder.root} "
            f"(first: {missing} of the pair {_file(first)}, {_file(second)}): "
            "restore the images or use the pairs of this folder"
        )


def _person(image: str) -> str:
    """Return the identity of ``image``, its folder; empty in a flat folder."""
    return image.rpartition("/")[0]


def _file(image: str) -> str:
    return image.rpartition("/")[2]


def _header(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Return the number of folds, and of genuine (and of impostor) pairs per fold."""
    numbers = [_positive(field) for field in lines[0][1].split()] if lines else []
    if len(numbers) not in (1, 2) or None in numbers:
        raise PairsError(f"{path}, line 1: expected 'folds<TAB>pairs' or 'pairs', integers >= 1")
    *folds, per_fold = (number for number in numbers if number is not None)
    return (folds[0] if folds else 1), per_fold


def _faces(path: Path, number: int, line: str, is_same: bool) -> tuple[str, str]:
    line = line.strip()  # a trailing tab does not start a field
    fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
    expected = 3 if is_same else 4
    if len(fields) == expected:
        name, first, *other_name, second = fields
        a, b = _positive(first), _positive(second)
        if a is not None and b is not None:
            return _image(name, a), _image(other_name[0] if other_name else name, b)
    wanted = "a genuine pair 'name<TAB>i<TAB>j'" if is_same else "an impostor pair 'name1<TAB>i<TAB>name2<TAB>j'"
    raise PairsError(f"{path}, line {number}: expected {wanted}, got {line!r}")


def _image(name: str, number: int) -> str:
    return f"{name}/{name}_{number:04d}"


def _positive(field: str) -> int | None:
    return whole_number(field) or None
