"""Random verification pairs of a folder, in balanced folds without common identities."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qface.checks import check_seed, check_whole
from qface.data.folders import ImageFolder
from qface.data.pairs import ResolvedPairs
from qface.errors import PairsError
from qface.files import check_folder, replacing

__all__ = ["draw_pairs", "make_pairs", "write_pairs"]

_Pair = tuple[int, int]


def make_pairs(
    images: str | Path,
    output: str | Path,
    identities: str | Path | None = None,
    folds: int = 10,
    pairs_per_fold: int = 300,
    seed: int = 0,
) -> ResolvedPairs:
    """Draw random genuine and impostor pairs from a folder and write them to a file.

    No pair is drawn twice, and no identity is in two folds. The file has LFW's format if the images are named as in
    LFW, else lines ``path,path,flag,fold``.

    Args:
        images: folder of crops with one subfolder per identity.
        output: the text file to write.
        identities: identities to use; see :func:`qface.data.select_identities`.
        folds: number of folds, >= 2.
        pairs_per_fold: number of genuine pairs per fold, and of impostor pairs, >= 1.
        seed: random seed.

    Returns:
        The pairs, as indices of the folder's images.

    Raises:
        ConfigError: a setting is out of range.
        ExportError: the file cannot be written.
        ImagesError: the folder cannot be read.
        PairsError: the folder is flat, or a fold has too few pairs.

    Example:
        >>> len(qface.make_pairs("faces/", "pairs.txt", folds=2, pairs_per_fold=20))
        80
    """
    check_folder(output)
    folder = ImageFolder(images, identities=identities)
    pairs = draw_pairs(folder, folds, pairs_per_fold, seed)
    write_pairs(output, pairs, folder)
    return pairs


def draw_pairs(folder: ImageFolder, folds: int = 10, pairs_per_fold: int = 300, seed: int = 0) -> ResolvedPairs:
    """Draw equal numbers of genuine and impostor pairs in each fold, as in :func:`make_pairs`.

    Genuine pairs are spread over the identities as evenly as their number of images allows.

    Args:
        folder: the images.
        folds: number of folds, >= 2.
        pairs_per_fold: number of pairs of each kind per fold, >= 1.
        seed: random seed.

    Raises:
        ConfigError: a setting is out of range.
        PairsError: the folder is flat, or a fold has too few pairs; the message says how many it has.
    """
    check_whole(2, folds=folds)
    check_whole(1, pairs_per_fold=pairs_per_fold)
    check_seed(seed)
    if folder.labels is None:
        raise PairsError(f"{folder.root} has no subfolders: pairs need a folder with one subfolder per identity")
    rng = np.random.default_rng(seed)
    people = _dealt(folder.labels.numpy(), folds, rng)
    _check_enough(people, pairs_per_fold)
    drawn = [(_of_one(fold, pairs_per_fold, rng), _of_two(fold, pairs_per_fold, rng)) for fold in people]
    first, second = np.array([pair for kinds in drawn for kind in kinds for pair in kind], np.int64).T
    position = np.arange(len(first))
    return ResolvedPairs(
        first, second, position // pairs_per_fold % 2 == 0, position // (2 * pairs_per_fold), dropped=0
    )


def _dealt(labels: npt.NDArray[np.int64], folds: int, rng: np.random.Generator) -> list[list[list[int]]]:
    """Distribute identities over folds by image count; return the image indices by fold and identity."""
    counts = np.unique(labels, return_counts=True)[1]
    images_of = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    people = [images_of[person].tolist() for person in rng.permutation(len(images_of))]
    people.sort(key=len, reverse=True)  # a stable sort: equal counts stay shuffled
    return [people[fold::folds] for fold in range(folds)]


def _check_enough(people: Sequence[Sequence[Sequence[int]]], wanted: int) -> None:
    """Raise if the fold with the fewest pairs has too few."""
    of_one, of_two = min((_pairs_among([len(images) for images in fold]) for fold in people), key=min)
    if min(of_one, of_two) < wanted:
        raise PairsError(
            f"one of {len(people)} folds has {of_one:,} genuine and {of_two:,} impostor pairs, but {wanted:,} of each "
            "are needed: use fewer pairs per fold, fewer folds, or more identities"
        )


def _pairs_among(images_of: Sequence[int]) -> tuple[int, int]:
    """Return the number of genuine and impostor pairs among identities with these image counts."""
    of_one = sum(math.comb(images, 2) for images in images_of)
    return of_one, math.comb(sum(images_of), 2) - of_one


def _of_one(people: Sequence[Sequence[int]], wanted: int, rng: np.random.Generator) -> list[_Pair]:
    """Draw genuine pairs: one per identity in each round."""
    shuffled = [rng.permutation(list(itertools.combinations(images, 2))).tolist() for images in people]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    return list(itertools.islice(((a, b) for pair in turns if pair is not None for a, b in [pair]), wanted))


def _of_two(people: Sequence[Sequence[int]], wanted: int, rng: np.random.Generator) -> list[_Pair]:
    """Draw distinct impostor pairs uniformly."""
    images = np.concatenate([np.asarray(each) for each in people])
    owners = np.repeat(np.arange(len(people)), [len(each) for each in people])
    found: dict[_Pair, None] = {}
    while len(found) < wanted:
        a, b = np.sort(rng.integers(0, len(images), (2, wanted)), axis=0)
        for one, other in zip(a[owners[a] != owners[b]], b[owners[a] != owners[b]], strict=True):
            found.setdefault((int(images[one]), int(images[other])))
    return list(found)[:wanted]


def write_pairs(path: str | Path, pairs: ResolvedPairs, folder: ImageFolder) -> None:
    """Write ``pairs`` in LFW's format if the names allow it, else as lines ``path,path,flag,fold``.

    Args:
        path: the file to write.
        pairs: pairs from :func:`draw_pairs` of this folder.
        folder: the images.

    Raises:
        ExportError: the file cannot be written.
    """
    names = [file.relative_to(folder.root).as_posix() for file in folder.paths]
    used = {names[image] for side in (pairs.first, pairs.second) for image in side}
    numbered = {name: number for name in used if (number := _number_in_lfw(name)) is not None}
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if len(numbered) == len(used):
            folds = int(pairs.fold.max()) + 1
            file.write(f"{folds}\t{len(pairs) // (2 * folds)}\n")
            for a, b, same in zip(pairs.first, pairs.second, pairs.same, strict=True):
                file.write(_lfw_line(names[a], names[b], bool(same), numbered))
        else:
            lines = csv.writer(file, lineterminator="\n")
            for a, b, same, fold in zip(pairs.first, pairs.second, pairs.same, pairs.fold, strict=True):
                lines.writerow([names[a], names[b], int(same), fold])


def _number_in_lfw(name: str) -> int | None:
    """Return the image number of a name like ``Ann/Ann_0007.jpg``; None for other names."""
    person, _, file = name.partition("/")
    number = re.fullmatch(re.escape(person) + r"_(\d{4,18})\.\w+", file, re.ASCII)
    plain = person == person.strip() and not re.search(r"[\t\r\n]", person)
    if number is None or not plain or int(number[1]) == 0 or f"{int(number[1]):04d}" != number[1]:
        return None
    return int(number[1])


def _lfw_line(first: str, second: str, same: bool, numbered: dict[str, int]) -> str:
    fields = [first.partition("/")[0], numbered[first], second.partition("/")[0], numbered[second]]
    if same:
        del fields[2]
    return "\t".join(map(str, fields)) + "\n"
