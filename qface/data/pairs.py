"""Lists of verification pairs in the format of LFW (http://vis-www.cs.umass.edu/lfw/#views)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qface.data.folders import ImageFolder
from qface.errors import PairsError

__all__ = ["PairList", "ResolvedPairs", "read_lfw_pairs", "resolve_pairs"]

Face = tuple[str, int]
"""A person's name and the number of the image, from 1."""


@dataclass(frozen=True, eq=False)
class PairList:
    """Pairs as a file names them.

    Args:
        path: the file, for messages.
        first: name and number of each pair's first image.
        second: likewise for the second image.
        same: bool [pairs], whether both show one person.
        fold: int64 [pairs], numbered from 0.
    """

    path: Path
    first: list[Face]
    second: list[Face]
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


def read_lfw_pairs(path: str | Path) -> PairList:
    """Read LFW's view-2 format: ``folds<TAB>n``, then n same and n different pairs for each fold.

    A same pair is ``name<TAB>i<TAB>j``, a different one ``name1<TAB>i<TAB>name2<TAB>j``. A header of the
    single number n (view 1) means one fold. Without tabs, any blanks separate the fields. Blank lines do
    not count.

    Raises:
        PairsError: the file cannot be read, a line is malformed, or the number of pairs is not as announced.
    """
    path = Path(path)
    lines = list(_numbered_lines(path))
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
    """Find the images of ``pairs`` in ``folder``: ``<name>/<name>_%04d`` with any ending.

    A pair with somebody whom ``people`` has not selected is left out and counted; folds keep their numbers.

    Raises:
        PairsError: the folder is flat, or pairs name people or images that are not on disk (all are counted).
    """
    if not folder.names:
        raise PairsError(f"{pairs.path} names people, but {folder.root} is flat: pass one subfolder a person")
    index = {(path.parent.name, path.stem): number for number, path in enumerate(folder.paths)}
    both = list(zip(pairs.first, pairs.second, strict=True))
    _check_on_disk(pairs.path, both, folder, index)
    selected = set(folder.names)
    kept = np.array([a[0] in selected and b[0] in selected for a, b in both], dtype=np.bool_)
    remaining = [pair for pair, keep in zip(both, kept, strict=True) if keep]
    return ResolvedPairs(
        first=np.array([index[_key(a)] for a, _ in remaining], dtype=np.int64),
        second=np.array([index[_key(b)] for _, b in remaining], dtype=np.int64),
        same=pairs.same[kept],
        fold=pairs.fold[kept],
        dropped=int(np.count_nonzero(~kept)),
    )


def _check_on_disk(
    path: Path, both: Sequence[tuple[Face, Face]], folder: ImageFolder, index: dict[tuple[str, str], int]
) -> None:
    on_disk, selected = set(folder.all_names), set(folder.names)

    def is_missing(face: Face) -> bool:
        # The images of people who are not selected are not listed: only the people can be looked up.
        return face[0] not in on_disk or (face[0] in selected and _key(face) not in index)

    broken = [(pair, face) for pair in both if (face := next(filter(is_missing, pair), None))]
    if broken:
        (first, second), missing = broken[0]
        raise PairsError(
            f"{len(broken)} of {len(both)} pairs in {path} name images that are not in {folder.root} "
            f"(first: {'/'.join(_key(missing))} of the pair {_key(first)[1]}, {_key(second)[1]}): "
            "restore the images or use the pairs of this folder"
        )


def _key(face: Face) -> tuple[str, str]:
    name, number = face
    return name, f"{name}_{number:04d}"


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PairsError(f"the pair list {path} does not exist: pass a text file in the format of LFW") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"the pair list {path} cannot be read as text: {error}") from error
    return ((number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def _header(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Number of folds, and of same (as of different) pairs in each."""
    numbers = [_positive(field) for field in lines[0][1].split()] if lines else []
    if len(numbers) not in (1, 2) or None in numbers:
        raise PairsError(f"{path}, line 1: expected 'folds<TAB>pairs' or 'pairs', two positive numbers or one")
    *folds, per_fold = (number for number in numbers if number is not None)
    return (folds[0] if folds else 1), per_fold


def _faces(path: Path, number: int, line: str, is_same: bool) -> tuple[Face, Face]:
    fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
    expected = 3 if is_same else 4
    if len(fields) == expected:
        name, first, *other_name, second = fields
        a, b = _positive(first), _positive(second)
        if a is not None and b is not None:
            return (name, a), (other_name[0] if other_name else name, b)
    wanted = "a same pair 'name<TAB>i<TAB>j'" if is_same else "a different pair 'name1<TAB>i<TAB>name2<TAB>j'"
    raise PairsError(f"{path}, line {number}: expected {wanted}, not {line.strip()!r}")


def _positive(field: str) -> int | None:
    return int(field) if field.isdecimal() and int(field) > 0 else None
