"""Lists of verification pairs: CSV, and the text formats of LFW, SLLFW, CALFW and CPLFW.

LFW's (http://vis-www.cs.umass.edu/lfw/#views) has a header and names people and numbers; the others have no header,
name files, and spend two lines on a pair: SLLFW's ``Ann/Ann_0001.jpg``, of one person where the folders are equal, and
CALFW's and CPLFW's ``Ann_0001.jpg 3``, of one person where the number is not 0.

A CSV has a line ``path,path,flag`` for each pair, in any order, and a header or none; commas, semicolons, tabs or
blanks part the fields. The flag, in any of the three columns, is 1 for one person, and 0 or -1 for two. All pairs are
one fold, unless each line ends with a fourth field, the number of its fold.
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
from qface.errors import PairsError

__all__ = [
    "PairList",
    "PairedImages",
    "ResolvedPairs",
    "folds_of_each_kind",
    "read_lfw_pairs",
    "read_pairs",
    "resolve_pairs",
]

_FOLDS = 10  # where a format has none of its own

_FLAGS = {"1": True, "0": False, "-1": False, "1.0": True, "0.0": False, "true": True, "false": False}

LineT = TypeVar("LineT")


@dataclass(frozen=True, eq=False)
class PairList:
    """Pairs as a file names them.

    Args:
        path: the file, for messages.
        first: each pair's first image, ``person/file`` or ``file``, without the file's ending.
        second: likewise for the second image.
        same: bool [pairs], whether both show one person.
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
    """Pairs as indices into the ``paths`` of a folder.

    Args:
        first: int64 [pairs], each pair's first image.
        second: int64 [pairs], each pair's second image.
        same: bool [pairs], whether both show one person.
        fold: int64 [pairs], as the file numbers them.
        dropped: how many pairs of the file are left out, because somebody in them is not selected.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    same: npt.NDArray[np.bool_]
    fold: npt.NDArray[np.int64]
    dropped: int

    def __len__(self) -> int:
        return len(self.first)


class PairedImages(IndexedImages):
    """Images that bring their own pairs.

    Attributes:
        path: the file or folder they come from.
        pairs: which images to compare, and in which fold.
    """

    path: Path
    pairs: ResolvedPairs


def read_pairs(path: str | Path) -> PairList:
    """Read a list in any of the formats of this module; its first line tells which.

    Raises:
        PairsError: the file cannot be read, a line is malformed, or the number of pairs is not as announced.
    """
    path = Path(path)
    _, first = next(numbered_lines(path, PairsError), (1, ""))
    delimiter = next((each for each in ",;\t" if each in first), None)
    if len(_fields(first, delimiter)) == 3 or delimiter in (",", ";"):
        return _read_flagged_pairs(path, delimiter)
    if "." not in first:
        return read_lfw_pairs(path)
    return _read_sllfw_pairs(path) if "/" in first else _read_calfw_pairs(path)


def _fields(line: str, delimiter: str | None) -> list[str]:
    """The fields of a line; blanks part them where ``delimiter`` is None, and quotes may enclose them otherwise."""
    fields = line.split() if delimiter is None else next(csv.reader([line.strip()], delimiter=delimiter), [])
    return [field.strip() for field in fields]


def _read_flagged_pairs(path: Path, delimiter: str | None) -> PairList:
    """A line ``path path flag`` for each pair; the first line may name the columns."""
    rows = [(number, line, _fields(line, delimiter)) for number, line in numbered_lines(path, PairsError)]
    if not any(field.lower() in _FLAGS for field in rows[0][2]):
        rows = rows[1:]
    if not rows:
        raise PairsError(f"{path} holds no pairs: expected lines 'path,path,flag' with a flag of 0 or 1")
    fold, rows = _folds_column(path, rows)
    columns = [at for at in (2, 0, 1) if all(len(row) == 3 and row[at].lower() in _FLAGS for _, _, row in rows)]
    if not columns:
        number, line, _ = next(
            (each for each in rows if len(each[2]) != 3 or each[2][2].lower() not in _FLAGS), rows[0]
        )
        raise PairsError(
            f"{path}, line {number}: expected 'path,path,flag' with a flag of 0 or 1, not {line.strip()!r}"
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
    """The fold of each row, and the rows without it; one fold where they do not have four fields."""
    if len(rows[0][2]) != 4:
        return np.zeros(len(rows), np.int64), rows
    folds = [whole_number(fields[3]) if len(fields) == 4 else None for _, _, fields in rows]
    for (number, line, _), fold in zip(rows, folds, strict=True):
        if fold is None:
            raise PairsError(f"{path}, line {number}: expected 'path,path,flag,fold', not {line.strip()!r}")
    return np.array(folds, np.int64), [(number, line, fields[:3]) for number, line, fields in rows]


def _read_sllfw_pairs(path: Path) -> PairList:
    """Two lines ``name/name_0001.jpg`` for each pair; each fold has as many pairs of one person as of two."""
    lines = [(number, line.strip()) for number, line in numbered_lines(path, PairsError)]
    for number, line in lines:
        if line.count("/") != 1:
            raise PairsError(f"{path}, line {number}: expected 'name/name_0001.jpg', not {line!r}")
    files = [line for _, line in lines]
    return _of_files(path, files, [one.split("/")[0] == other.split("/")[0] for one, other in _twos(path, files)])


def _read_calfw_pairs(path: Path) -> PairList:
    """Two lines ``name_0001.jpg number`` for each pair; 0 stands for two people, anything else for one."""
    files, numbers = [], []
    for number, line in numbered_lines(path, PairsError):
        fields = line.split()
        kind = whole_number(fields[-1])
        if len(fields) != 2 or kind is None:
            raise PairsError(f"{path}, line {number}: expected 'name_0001.jpg' and a number, not {line.strip()!r}")
        files.append(fields[0])
        numbers.append(kind)
    for pair, (one, other) in enumerate(_twos(path, numbers)):
        if one != other:
            raise PairsError(f"{path}: the lines of pair {pair + 1} end in different numbers, {one} and {other}")
    return _of_files(path, files, [one != 0 for one, _ in _twos(path, numbers)])


def _twos(path: Path, lines: Sequence[LineT]) -> list[tuple[LineT, LineT]]:
    if not lines or len(lines) % 2:
        raise PairsError(f"{path} holds {len(lines)} lines, and needs two for each pair: restore the file")
    return list(zip(lines[::2], lines[1::2], strict=True))


def _of_files(path: Path, files: Sequence[str], same: Sequence[bool]) -> PairList:
    """Two of ``files`` for each pair; folds are ten runs of the pairs of one person, and of those of two."""
    stems = [_stem(file) for file in files]
    kinds = np.array(same, np.bool_)
    return PairList(path, stems[::2], stems[1::2], kinds, folds_of_each_kind(kinds))


def folds_of_each_kind(same: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Ten folds, int64 [pairs]: ten runs of the pairs of one person, and of those of two, wherever they stand."""
    fold = np.zeros(len(same), np.int64)
    for kind in (same, ~same):
        count = int(np.count_nonzero(kind))
        fold[kind] = np.arange(count) * _FOLDS // max(count, 1)
    return fold


def _stem(file: str) -> str:
    """``file`` without its ending."""
    return file.rpartition(".")[0] or file


def read_lfw_pairs(path: str | Path) -> PairList:
    """Read LFW's view-2 format: ``folds<TAB>n``, then n same and n different pairs for each fold.

    A same pair is ``name<TAB>i<TAB>j``, a different one ``name1<TAB>i<TAB>name2<TAB>j``. A header of the
    single number n (view 1) means one fold. Without tabs, any blanks separate the fields. Blank lines do
    not count.

    Raises:
        PairsError: the file cannot be read, a line is malformed, or the number of pairs is not as announced.
    """
    path = Path(path)
    lines = list(numbered_lines(path, PairsError))
    folds, per_fold = _header(path, lines)
    pairs = lines[1:]
    if len(pairs) != 2 * folds * per_fold:
        raise PairsError(
            f"{path} announces {2 * folds * per_fold} pairs ({folds} x 2 x {per_fold}) "
            f"but holds {len(pairs)}: correct its first line or restore the file"
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
    """Find the images of ``pairs`` in ``folder``, with any ending.

    A pair with somebody whom ``identities`` has not selected is left out and counted; folds keep their numbers.

    Raises:
        PairsError: the list names people and the folder is flat, or the other way round; or pairs name people or
            images that are not on disk (all are counted).
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
    """The number of each image by its name without ending."""
    index: dict[str, int] = {}
    for number, path in enumerate(folder.paths):
        stem = composed(path.relative_to(folder.root).with_suffix("").as_posix())
        if stem in index:
            raise PairsError(f"{folder.paths[index[stem]]} and {path} have one name in a list of pairs: move one away")
        index[stem] = number
    return index


def _check_layout(pairs: PairList, folder: ImageFolder) -> None:
    names_people = "/" in pairs.first[0]
    if names_people and not folder.names:
        raise PairsError(f"{pairs.path} names people, but {folder.root} is flat: pass one subfolder a person")
    if folder.names and not names_people:
        raise PairsError(
            f"{pairs.path} names files, but {folder.root} has subfolders: pass the folder that holds the files"
        )


def _check_on_disk(path: Path, both: Sequence[tuple[str, str]], folder: ImageFolder, index: dict[str, int]) -> None:
    on_disk, selected = set(map(composed, folder.all_names)), set(map(composed, folder.names))

    def is_missing(image: str) -> bool:
        # The images of people who are not selected are not listed: only the people can be looked up.
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
    """The folder of ``image``; none in a flat one."""
    return image.rpartition("/")[0]


def _file(image: str) -> str:
    return image.rpartition("/")[2]


def _header(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Number of folds, and of same (as of different) pairs in each."""
    numbers = [_positive(field) for field in lines[0][1].split()] if lines else []
    if len(numbers) not in (1, 2) or None in numbers:
        raise PairsError(f"{path}, line 1: expected 'folds<TAB>pairs' or 'pairs', two positive numbers or one")
    *folds, per_fold = (number for number in numbers if number is not None)
    return (folds[0] if folds else 1), per_fold


def _faces(path: Path, number: int, line: str, is_same: bool) -> tuple[str, str]:
    line = line.strip()  # a tab at the end begins no field
    fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
    expected = 3 if is_same else 4
    if len(fields) == expected:
        name, first, *other_name, second = fields
        a, b = _positive(first), _positive(second)
        if a is not None and b is not None:
            return _image(name, a), _image(other_name[0] if other_name else name, b)
    wanted = "a same pair 'name<TAB>i<TAB>j'" if is_same else "a different pair 'name1<TAB>i<TAB>name2<TAB>j'"
    raise PairsError(f"{path}, line {number}: expected {wanted}, not {line!r}")


def _image(name: str, number: int) -> str:
    return f"{name}/{name}_{number:04d}"


def _positive(field: str) -> int | None:
    return whole_number(field) or None
