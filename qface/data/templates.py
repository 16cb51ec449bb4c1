"""IJB-B and IJB-C: loose crops with landmarks, the templates they make up, and pairs of templates.

A folder as InsightFace gives it out::

    IJBC/loose_crop/1.jpg ...
    IJBC/meta/ijbc_face_tid_mid.txt         image, template, media
    IJBC/meta/ijbc_name_5pts_score.txt      image, five landmarks, the detector's score
    IJBC/meta/ijbc_template_pair_label.txt  template, template, 1 where both are of one person

The first two name the same images in the same order.
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
from qface.data.text_lines import numbered_lines, whole_number
from qface.errors import ImagesError, PairsError, one_line

__all__ = ["LooseCrops", "TemplateSet", "read_templates"]

_LOGGER = logging.getLogger("qface")
_FILES = {"faces": "*_face_tid_mid.txt", "landmarks": "*_name_5pts_score.txt", "pairs": "*_template_pair_label.txt"}


class LooseCrops(IndexedImages):
    """Photos of one face each, aligned by known landmarks when they are read.

    Args:
        root: the folder of the photos.
        faces: each one's landmarks.
    """

    def __init__(self, root: Path, faces: Sequence[FaceLandmarks]) -> None:
        self.root = root
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Align the faces at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: a photo is missing or damaged, or its landmarks are in one place; it is named.
        """
        return stack_crops([self._crop(self.faces[index]) for index in indices])

    def content(self, index: int) -> bytes:
        """Name, landmarks and bytes of the photo at ``index``.

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
                _LOGGER.warning("%s: its landmarks are of no face in it, since %s", path, reason)
            return np.asarray(align_face(turned, face.points))
        except (*UNREADABLE, ImagesError) as error:
            raise ImagesError(f"{path} cannot be read as a face ({one_line(error)}): restore it") from error


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """Images, and how they are compared: all images of a template at once.

    Args:
        images: the images.
        scores: float32 [images], how sure the detector was of each; None where it is not told of all of them.
        templates: int64 [images], which template each belongs to, from 0 in the order of ``names``.
        media: int64 [images], the photo or video that each comes from.
        names: int64 [templates], the numbers that the files give templates, ascending.
        first: int32 [pairs], the first template of each pair, from 0.
        second: likewise the second.
        same: bool [pairs], whether both are of one person.
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
    """Read the folder ``root`` of IJB-B or IJB-C; photos are opened only when they are embedded.

    Raises:
        ImagesError: a file is missing or malformed, two files do not name the same images, or most landmarks are of no
            face.
        PairsError: the list of pairs is malformed, or names templates without images.
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
    found = glob.glob(pattern, root_dir=folder)  # without names that begin with a dot, unlike Path.glob
    if len(found) != 1:
        raise ImagesError(f"{folder} holds {len(found)} files {pattern}, not one: pass the folder of IJB-B or IJB-C")
    return folder / found[0]


def _scores(faces: Sequence[FaceLandmarks]) -> npt.NDArray[np.float32] | None:
    scores = [face.score for face in faces if face.score is not None]
    return np.array(scores, np.float32) if len(scores) == len(faces) else None


def _read_faces(path: Path, faces: Sequence[FaceLandmarks]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Template and media of each image, as the file numbers them."""
    rows = []
    for position, (number, line) in enumerate(numbered_lines(path)):
        fields = line.split()
        numbers = [_number(field) for field in fields[1:]]
        if len(numbers) != 2 or None in numbers:
            raise ImagesError(f"{path}, line {number}: expected 'image template media', not {line.strip()!r}")
        if position < len(faces) and fields[0] != faces[position].file:
            raise ImagesError(f"{path}, line {number} is of {fields[0]}, and the landmarks of {faces[position].file}")
        rows.append(numbers)
    if len(rows) != len(faces):
        raise ImagesError(f"{path} names {len(rows)} images, and the landmarks {len(faces)}: restore the files")
    table = np.array(rows, np.int64)
    return table[:, 0], table[:, 1]


def _number(text: str) -> int | None:
    """The number that ``text`` is, negative or not."""
    number = whole_number(text.removeprefix("-"))
    return -number if number is not None and text.startswith("-") else number


def _read_pairs(
    path: Path, templates: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Each pair's templates, as positions in ``templates``, and whether they are of one person."""
    try:
        table = np.loadtxt(path, np.int64, comments=None, ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise PairsError(f"{path} cannot be read as pairs of templates: {one_line(error)}") from error
    if not table.size or table.shape[1] != 3 or not np.isin(table[:, 2], (0, 1)).all():
        raise PairsError(f"{path} does not hold lines 'template template 0-or-1': restore it")
    positions = np.searchsorted(templates, table[:, :2]).clip(max=len(templates) - 1).astype(np.int32)
    unknown = (templates[positions] != table[:, :2]).any(axis=1)
    if unknown.any():
        raise PairsError(f"{np.count_nonzero(unknown)} of {len(table)} pairs in {path} name templates without images")
    if len(np.unique(table[:, 2])) < 2:
        raise PairsError(f"{path} holds only one kind of pairs: verification needs pairs of one person and of two")
    return positions[:, 0].copy(), positions[:, 1].copy(), table[:, 2] == 1
