"""Text files with five landmarks per photo.

Supported lines:

- ``file x1 y1 ... x5 y5 [score]``, as in ``ijbc_name_5pts_score.txt`` of IJB-B and IJB-C;
- ``file x1 ... x5 y1 ... y5 [score]``, as written by scripts around MTCNN;
- ``file [{'box': ..., 'keypoints': ..., 'confidence': ...}, ...]``, the printed output of the package mtcnn.

Instead of lines, a file may be a JSON object that maps photos to these dictionaries.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qface.data.alignment import Landmarks, landmark_fault
from qface.data.text_lines import numbered_lines
from qface.errors import ImagesError
from qface.limits import parse_json

__all__ = ["FaceLandmarks", "check_landmarks", "read_landmarks"]

_LOGGER = logging.getLogger("qface")
_LOOKED_AT = 1000  # minimum number of lines to check, evenly spaced: IJB-C has half a million
_KEYPOINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")  # left as seen by the viewer
_DICTIONARIES = re.compile(r"""(?<=\s)((\[\s*)?\{\s*['"].*|\[\s*\])$""")
_PYTHON_TO_JSON = str.maketrans("'()", '"[]')  # safe, since the only strings in these dictionaries are the keys


@dataclass(frozen=True, eq=False)
class FaceLandmarks:
    """Landmarks of one face from a file.

    Args:
        file: name of the photo.
        points: float64 [5, 2]; see :data:`qface.data.alignment.Landmarks`.
        score: detection score; None if the line has none.
    """

    file: str
    points: Landmarks
    score: float | None


def read_landmarks(path: str | Path) -> list[FaceLandmarks]:
    """Read a landmark file in any format of this module; of several faces in mtcnn output, the largest.

    Args:
        path: the landmark file.

    Returns:
        The faces in the order of the file.

    Raises:
        ImagesError: the file cannot be read or has no landmarks, or a line is malformed; the message names it.
        LimitError: a dictionary exceeds a limit of :mod:`qface.limits`.
    """
    path = Path(path)
    lines = list(numbered_lines(path))
    if lines and lines[0][1].lstrip().startswith("{"):
        found = _faces_of_json(path, "".join(line for _, line in lines))
    else:
        found = [_face(path, number, line) for number, line in lines]
    faces = [face for face in found if face is not None]
    if not faces:
        raise ImagesError(f"{path} has no landmarks: expected lines 'file x1 y1 ... x5 y5'")
    return _with_pairs(path, faces)


def check_landmarks(path: str | Path, faces: Mapping[str, Landmarks]) -> None:
    """Raise if most landmarks of a file cannot be a face; log a warning if only some cannot.

    Args:
        path: the file, for messages.
        faces: its landmarks by photo.

    Raises:
        ImagesError: more than half of the landmarks cannot be a face; the message names the first with the reason.
    """
    names = [name for name, points in faces.items() if np.ptp(points, axis=0).any()]
    apart = {name: faces[name] for name in names[:: max(1, len(names) // _LOOKED_AT)]}
    faults = {name: reason for name, points in apart.items() if (reason := landmark_fault(points))}
    if not faults:
        return
    name, reason = next(iter(faults.items()))
    if 2 * len(faults) > len(apart):
        raise ImagesError(
            f"{len(faults)} of {len(apart)} lines in {path} are not a face (first: {name}: {reason}): write "
            "'file x1 y1 ... x5 y5' in pixels: eyes, nose, corners of the mouth, the viewer's left first"
        )
    _LOGGER.warning("%s: %d of %d lines are not a face (first: %s: %s)", path, len(faults), len(apart), name, reason)


def _with_pairs(path: Path, faces: list[FaceLandmarks]) -> list[FaceLandmarks]:
    """Return ``faces``, reordered from x1 ... x5 y1 ... y5 if more lines are then valid faces."""
    looked_at = [face.points for face in faces[:: max(1, len(faces) // _LOOKED_AT)]]
    if _count_faces(list(map(_paired, looked_at))) <= _count_faces(looked_at):
        return faces
    _LOGGER.info("%s: lines are read in the order x1 ... x5 y1 ... y5 of MTCNN", path)
    return [replace(face, points=_paired(face.points)) for face in faces]


def _paired(points: Landmarks) -> Landmarks:
    """Reorder ``points`` from x1 ... x5 y1 ... y5."""
    return points.reshape(2, 5).T


def _count_faces(landmarks: Sequence[Landmarks]) -> int:
    return sum(landmark_fault(points) is None for points in landmarks)


def _faces_of_json(path: Path, text: str) -> list[FaceLandmarks | None]:
    try:
        photos = parse_json(text, f"{path}")
    except ValueError as error:
        raise ImagesError(f"{path} is not valid JSON ({error}): write it again") from error
    return [_largest(file, found, f"{path}, {file}") for file, found in photos.items()]


def _face_of_dictionaries(file: str, text: str, where: str) -> FaceLandmarks | None:
    try:
        found = parse_json(text.translate(_PYTHON_TO_JSON), where)
    except ValueError:
        found = None
    return _largest(file, found, where)


def _largest(file: str, found: Any, where: str) -> FaceLandmarks | None:
    """Return the largest face of mtcnn output, a list or a single dictionary; None for an empty list."""
    faces = found if isinstance(found, list) else [found]
    if not faces:
        return None
    try:
        face = max(faces, key=lambda face: face["box"][2] * face["box"][3])
        points = np.array([face["keypoints"][name] for name in _KEYPOINTS], np.float64)
        score = float(face["confidence"])
    except (LookupError, TypeError, ValueError, OverflowError):
        points, score = np.empty(0), math.nan
    if points.shape == (5, 2) and np.isfinite(points).all() and math.isfinite(score):
        return FaceLandmarks(file, points, score)
    raise ImagesError(f"{where}: expected box, keypoints and confidence of each face, as in output of mtcnn")


def _face(path: Path, number: int, line: str) -> FaceLandmarks | None:
    if found := _DICTIONARIES.search(line.strip()):
        file = found.string[: found.start()].strip()
        return _face_of_dictionaries(file, found[0], f"{path}, line {number}")
    # File names may contain spaces and numbers, so the line is parsed from its end.
    numbers = _numbers(line.split())[-11:]
    if len(numbers) >= 10 and all(map(math.isfinite, numbers)):
        points = np.array(numbers[:10], np.float64).reshape(5, 2)
        name = line.rsplit(maxsplit=len(numbers))[0].strip()
        return FaceLandmarks(name, points, numbers[10] if len(numbers) == 11 else None)
    raise ImagesError(
        f"{path}, line {number}: expected 'file x1 y1 ... x5 y5' and an optional score, got {line.strip()!r}"
    )


def _numbers(fields: list[str]) -> list[float]:
    """Return the trailing numbers of ``fields``, without the first field."""
    numbers: list[float] = []
    for text in reversed(fields[1:]):
        try:
            numbers.append(float(text))
        except ValueError:
            break
    return numbers[::-1]
