"""Galleries and probes of 1:N identification, as published with IJB-B and IJB-C.

They are in the folder of :mod:`qface.data.templates`; IJB-B has ``S1`` and ``S2`` in place of ``G1`` and ``G2``::

    IJBC/meta/ijbc_1N_gallery_G1.csv        templates of the first gallery
    IJBC/meta/ijbc_1N_gallery_G2.csv        templates of the second gallery, of other subjects
    IJBC/meta/ijbc_1N_probe_mixed.csv       templates of the probes

Each file has a header with ``TEMPLATE_ID`` and ``SUBJECT_ID``, and one line per image. Other columns are ignored, since
``ijbc_face_tid_mid.txt`` lists the images of each template.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qface.data.templates import TemplateSet, positions_of
from qface.data.text_lines import integer, numbered_lines
from qface.errors import ImagesError, PairsError

__all__ = ["TemplateGalleries", "read_galleries"]

Ints = npt.NDArray[np.int64]

_FILES = ("*_1N_gallery_[GS]1.csv", "*_1N_gallery_[GS]2.csv", "*_1N_probe_mixed.csv")
_COLUMNS = ("TEMPLATE_ID", "SUBJECT_ID")


@dataclass(frozen=True, eq=False)
class TemplateGalleries:
    """Galleries and probes of a :class:`qface.data.templates.TemplateSet`; templates are indices into its ``names``.

    Args:
        subjects: int64 [templates], subject of each template of the set, numbered from 0; -1 if no file lists it.
        galleries: templates of each gallery by its name in the files, such as ``"G1"``; int64 [any], one per subject.
        probes: int64 [any], templates of the probes.
    """

    subjects: Ints
    galleries: dict[str, Ints]
    probes: Ints


def read_galleries(root: str | Path, templates: TemplateSet) -> TemplateGalleries | None:
    """Read the galleries and probes of IJB-B or IJB-C.

    Args:
        root: the folder as described in this module.
        templates: the templates of this folder.

    Returns:
        The galleries and probes; None if the folder has none of the files.

    Raises:
        ImagesError: a file is missing or malformed, lists templates without images, or the files contradict each other.
        PairsError: the labels of the pairs contradict the subjects.
    """
    meta = Path(root) / "meta"
    files = _files(meta)
    if not files:
        return None
    lists = [_read_list(path, templates.names) for path in files]
    listed, subjects = np.concatenate(lists, axis=1)
    _check_templates(templates.names[listed], meta)
    subject_of = np.full(len(templates.names), -1, np.int64)
    subject_of[listed] = np.unique(subjects, return_inverse=True)[1].reshape(-1)
    *enrolled, probes = (found for found, _ in lists)
    galleries = {path.stem.rpartition("_")[2]: found for path, found in zip(files, enrolled, strict=False)}
    _check_subjects(subject_of, galleries, probes, templates.names, meta)
    _check_pairs(subject_of, templates, meta)
    return TemplateGalleries(subject_of, galleries, probes)


def _files(meta: Path) -> list[Path]:
    """Return the files of both galleries and of the probes; none if there is not any."""
    found = {pattern: glob.glob(pattern, root_dir=meta) for pattern in _FILES}
    if not any(found.values()):
        return []
    for pattern, files in found.items():
        if len(files) != 1:
            raise ImagesError(
                f"{meta} must have one file {pattern} for 1:N identification, but has {len(files)}: restore it, or "
                "move all *_1N_*.csv away to measure 1:1 verification only"
            )
    return [meta / files[0] for files in found.values()]


def _read_list(path: Path, names: Ints) -> Ints:
    """Return the listed templates, as indices into ``names``, and their subjects, int64 [2, templates]."""
    lines = numbered_lines(path)
    header = next(lines, (1, ""))[1]
    columns = [field.strip() for field in header.split(",")]
    if not set(_COLUMNS) <= set(columns):
        raise ImagesError(f"{path} must have a header with {' and '.join(_COLUMNS)}, got {header.strip()!r:.80}")
    places = [columns.index(name) for name in _COLUMNS]
    rows = {_numbers(path, number, line, places) for number, line in lines}
    if not rows:
        raise ImagesError(f"{path} lists no templates: restore it")
    numbers, subjects = np.array(sorted(rows), np.int64).T
    positions, unknown = positions_of(names, numbers)
    if unknown.any():
        raise ImagesError(
            f"{np.count_nonzero(unknown)} of {len(numbers)} templates in {path} have no images (first: "
            f"{numbers[unknown][0]}): restore the files"
        )
    return np.stack([positions, subjects])


def _numbers(path: Path, number: int, line: str, places: list[int]) -> tuple[int, int]:
    fields = line.split(",")
    template, subject = (integer(fields[at].strip()) if at < len(fields) else None for at in places)
    if template is None or subject is None:
        raise ImagesError(f"{path}, line {number}: expected integers as {' and '.join(_COLUMNS)}, got {line.strip()!r}")
    return template, subject


def _check_templates(listed: Ints, meta: Path) -> None:
    """Raise if a template has two subjects, or is in two lists."""
    numbers, times = np.unique(listed, return_counts=True)
    if (times > 1).any():
        raise ImagesError(
            f"the *_1N_*.csv files of {meta} list template {numbers[times > 1][0]} in two files or with two subjects: "
            "restore them"
        )


def _check_subjects(subjects: Ints, galleries: dict[str, Ints], probes: Ints, names: Ints, meta: Path) -> None:
    """Raise if a subject is enrolled twice, or a gallery has no mated probes."""
    enrolled = np.concatenate(list(galleries.values()))
    times = np.bincount(subjects[enrolled])
    if (times > 1).any():
        twice = enrolled[subjects[enrolled] == np.argmax(times > 1)]
        raise ImagesError(
            f"the galleries of {meta} enroll one subject with templates {names[twice[0]]} and {names[twice[1]]}, but "
            "must enroll each once: restore them"
        )
    for name, templates in galleries.items():
        if not np.isin(subjects[probes], subjects[templates]).any():
            raise ImagesError(f"no probe of {meta} shows a subject of gallery {name}: restore the *_1N_*.csv files")


def _check_pairs(subjects: Ints, templates: TemplateSet, meta: Path) -> None:
    """Raise if a pair of listed templates has another label than its subjects give."""
    first, second = subjects[templates.first], subjects[templates.second]
    wrong = (first >= 0) & (second >= 0) & ((first == second) != templates.same)
    if wrong.any():
        raise PairsError(
            f"the subjects in *_1N_*.csv contradict the labels of {np.count_nonzero(wrong)} of {len(wrong)} template "
            f"pairs in {meta}: restore the files"
        )
