"""IJB-B and IJB-C: face images with landmarks, templates, and pairs of templates.

The folder as published by InsightFace::

    IJBC/loose_crop/1.jpg ...
    IJBC/meta/ijbc_face_tid_mid.txt         image, template, media
    IJBC/meta/ijbc_name_5pts_score.txt      image, five landmarks, detection score
    IJBC/meta/ijbc_template_pair_label.txt  template, template, 1 for genuine or 0 for impostor pairs

The first two files list the same images in the same order. :mod:`qface.data.template_galleries` reads the files of 1:N
identification.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qface.data.alignment import align_face, landmark_fault
from qface.data.decoding import UNREADABLE, opened, stack_crops, upright
from qface.data.images import IndexedImages, named_content
from qface.data.landmarks import FaceLandmarks, check_landmarks, read_landmarks
from qface.data.text_lines import integer, numbered_lines
from qface.errors import ImagesError, PairsError, one_line

__all__ = ["LooseCrops", "TemplateSet", "people_of", "positions_of", "read_templates"]

_LOGGER = logging.getLogger("qface")
_FILES = {"faces": "*_face_tid_mid.txt", "landmarks": "*_name_5pts_score.txt", "pairs": "*_template_pair_label.txt"}


class LooseCrops(IndexedImages):
    """Photos of one face each, aligned by given landmarks when read.

    Args:
        root: the folder of the photos.
        faces: landmarks of each photo.
    """

    def __init__(self, root: Path, faces: Sequence[FaceLandmarks]) -> None:
        self.root = root
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Align the faces at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: a photo is missing or damaged, or its landmarks are all equal; the message names it.
        """
        return stack_crops([self._crop(self.faces[index]) for index in indices])

    def content(self, index: int) -> bytes:
        """Return name, landmarks and bytes of the photo at ``index``.

        Raises:
            ImagesError: it cannot be read.
        """
        face = self.faces[index]
        return named_content(self.root / face.file, f"{face.file} {np.asarray(face.points).tolist()}")

    def _crop(self, face: FaceLandmarks) -> npt.NDArray[np.uint8]:
        path = self.root / face.file
        try:
            with opened(path) as photo:
                turned = upright(photo)
            if reason := landmark_fault(face.points, turned.size):
                _LOGGER.warning("%s: its landmarks are not a face: %s", path, reason)
            return np.asarray(align_face(turned, face.points))
        except (*UNREADABLE, ImagesError) as error:
            raise ImagesError(f"{path} cannot be read as a face ({one_line(error)}): restore it") from error


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """Images grouped into templates, and pairs of templates to verify.

    Args:
        images: the images.
        scores: float32 [images], detection scores; None if any is missing.
        templates: int64 [images], template of each image, an index into ``names``.
        media: int64 [images], number of the photo or video of each image.
        names: int64 [templates], template numbers of the files, ascending.
        first: int32 [pairs], first template of each pair, an index into ``names``.
        second: int32 [pairs], second template of each pair, likewise.
        same: bool [pairs], True for genuine pairs.
    """

    images: LooseCrops
    scores: npt.NDArray[np.float32] | None
    templates: npt.NDArray[np.int64]
    media: npt.NDArray[np.int64]
    names: npt.NDArray[np.int64]
    first: npt.NDArray[np.int32]
    second: npt.NDArray[np.int32]
    same: npt.NDArray[np.bool_]


def read_templates(root: str | Path) -> TemplateSet:
    """Read the lists of IJB-B or IJB-C; photos are opened later, when they are embedded.

    Args:
        root: the folder as described in this module.

    Returns:
        The images, templates and pairs.

    Raises:
        ImagesError: a file is missing or malformed, the files list different images, or most landmarks cannot be a
            face.
        PairsError: the list of pairs is malformed or has templates without images.
    """
    root = Path(root)
    files = {what: _the_one(root / "meta", pattern) for what, pattern in _FILES.items()}
    faces = read_landmarks(files["landmarks"])
    check_landmarks(files["landmarks"], {face.file: face.points for face in faces})
    names, media = _read_faces(files["faces"], faces)
    templates, positions = np.unique(names, return_inverse=True)
    first, second, same = _read_pairs(files["pairs"], templates)
    return TemplateSet(
        images=LooseCrops(root / "loose_crop", faces),
        scores=_scores(faces),
        templates=positions.astype(np.int64),
        media=media,
        names=templates,
        first=first,
        second=second,
        same=same,
    )


def _the_one(folder: Path, pattern: str) -> Path:
    found = glob.glob(pattern, root_dir=folder)  # ignores hidden files, unlike Path.glob
    if len(found) != 1:
        raise ImagesError(
            f"{folder} must have one file {pattern}, but has {len(found)}: pass the folder of IJB-B or IJB-C"
        )
    return folder / found[0]


def _scores(faces: Sequence[FaceLandmarks]) -> npt.NDArray[np.float32] | None:
    scores = [face.score for face in faces if face.score is not None]
    return np.array(scores, np.float32) if len(scores) == len(faces) else None


def _read_faces(path: Path, faces: Sequence[FaceLandmarks]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the template and media numbers of each image."""
    rows = []
    for position, (number, line) in enumerate(numbered_lines(path)):
        fields = line.split()
        numbers = [integer(field) for field in fields[1:]]
        if len(numbers) != 2 or None in numbers:
            raise ImagesError(f"{path}, line {number}: expected 'image template media', got {line.strip()!r}")
        if position < len(faces) and fields[0] != faces[position].file:
            raise ImagesError(
                f"{path}, line {number} lists {fields[0]}, but the landmark file lists {faces[position].file}: restore "
                "the files"
            )
        rows.append(numbers)
    if len(rows) != len(faces):
        raise ImagesError(
            f"{path} lists {len(rows)} images, but the landmark file lists {len(faces)}: restore the files"
        )
    table = np.array(rows, np.int64)
    return table[:, 0], table[:, 1]


def _read_pairs(
    path: Path, templates: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return the template indices and the genuine flag of each pair."""
    try:
        table = np.loadtxt(path, np.int64, comments=None, ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise PairsError(f"{path} cannot be read as pairs of templates ({one_line(error)}): restore it") from error
    if not table.size or table.shape[1] != 3 or not np.isin(table[:, 2], (0, 1)).all():
        raise PairsError(f"{path} must have lines 'template template 0-or-1': restore it")
    positions, unknown = positions_of(templates, table[:, :2])
    lost = np.count_nonzero(unknown.any(axis=1))
    if lost:
        raise PairsError(f"{lost} of {len(table)} pairs in {path} have templates without images: restore the files")
    if len(np.unique(table[:, 2])) < 2:
        raise PairsError(f"{path} has only one kind of pairs: verification needs genuine and impostor pairs")
    return positions[:, 0].copy(), positions[:, 1].copy(), table[:, 2] == 1


def positions_of(
    names: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Find template numbers in ``names``.

    Args:
        names: int64 [templates], ascending.
        numbers: int64 [any shape], template numbers.

    Returns:
        Their indices, and True where there is no such template; of the shape of ``numbers``.
    """
    positions = np.searchsorted(names, numbers).clip(max=len(names) - 1).astype(np.int32)
    return positions, np.asarray(names[positions] != numbers)


def people_of(templates: TemplateSet) -> npt.NDArray[np.int64]:
    """Number the people by the pairs: templates that genuine pairs connect show one person.

    Args:
        templates: the templates with their pairs.

    Returns:
        int64 [templates], person of each template, numbered from 0.

    Raises:
        PairsError: an impostor pair has templates of one person.
    """
    first, second = templates.first[templates.same], templates.second[templates.same]
    lowest, before = np.arange(len(templates.names)), np.empty(0, np.int64)
    while not np.array_equal(lowest, before):
        before = lowest.copy()
        np.minimum.at(lowest, first, before[second])
        np.minimum.at(lowest, second, before[first])
        lowest = lowest[lowest]
    people = np.unique(lowest, return_inverse=True)[1].reshape(-1).astype(np.int64)
    wrong = (people[templates.first] == people[templates.second]) & ~templates.same
    if wrong.any():
        at = np.argmax(wrong)
        one, two = templates.names[[templates.first[at], templates.second[at]]]
        raise PairsError(
            f"templates {one} and {two} are an impostor pair, but genuine pairs connect them: restore the pair list"
        )
    return people
