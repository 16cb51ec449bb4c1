"""Text files that say where faces lie: a line ``file x1 y1 ... x5 y5`` each, with or without a detector's score.

This is the format of ``ijbc_name_5pts_score.txt`` of IJB-B and IJB-C.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qface.data.alignment import Landmarks, landmark_fault
from qface.data.text_lines import numbered_lines
from qface.errors import ImagesError

__all__ = ["FaceLandmarks", "check_landmarks", "read_landmarks"]

_LOGGER = logging.getLogger("qface")
_LOOKED_AT = 1000  # lines at least, spread evenly: IJB-C has half a million


@dataclass(frozen=True, eq=False)
class FaceLandmarks:
    """One line of a file.

    Args:
        file: the photo's name.
        points: float64 [5, 2]; see :data:`qface.data.alignment.Landmarks`.
        score: how sure the detector was; None where the line has none.
    """

    file: str
    points: Landmarks
    score: float | None


def read_landmarks(path: str | Path) -> list[FaceLandmarks]:
    """Read a file of landmarks, in its order.

    Raises:
        ImagesError: the file cannot be read, holds nothing, or a line is malformed; it is named.
    """
    path = Path(path)
    faces = [_face(path, number, line) for number, line in numbered_lines(path)]
    if not faces:
        raise ImagesError(f"{path} holds no landmarks: expected lines 'file x1 y1 ... x5 y5'")
    return faces


def check_landmarks(path: str | Path, faces: Mapping[str, Landmarks]) -> None:
    """Refuse a file of which most lines are of no face, in whatever photo; of fewer lines a warning says how many.

    Args:
        path: the file, for messages.
        faces: its landmarks by photo.

    Raises:
        ImagesError: more than half of the lines are of no face; the first is named with the reason.
    """
    names = [name for name, points in faces.items() if np.ptp(points, axis=0).any()]
    apart = {name: faces[name] for name in names[:: max(1, len(names) // _LOOKED_AT)]}
    faults = {name: reason for name, points in apart.items() if (reason := landmark_fault(points))}
    if not faults:
        return
    name, reason = next(iter(faults.items()))
    if 2 * len(faults) > len(apart):
        raise ImagesError(
            f"{len(faults)} of {len(apart)} lines in {path} are of no face (first: {name}, since {reason}): write "
            "'file x1 y1 ... x5 y5' in pixels of the photo: eyes, nose, corners of the mouth, the viewer's left first"
        )
    _LOGGER.warning(
        "%s: %d of %d lines are of no face (first: %s, since %s)", path, len(faults), len(apart), name, reason
    )


def _face(path: Path, number: int, line: str) -> FaceLandmarks:
    # File names may hold blanks, and perhaps numbers: what counts is how the line ends.
    numbers = _numbers(line.split())[-11:]
    if len(numbers) >= 10 and all(map(math.isfinite, numbers)):
        points = np.array(numbers[:10], np.float64).reshape(5, 2)
        name = line.rsplit(maxsplit=len(numbers))[0].strip()
        return FaceLandmarks(name, points, numbers[10] if len(numbers) == 11 else None)
    raise ImagesError(
        f"{path}, line {number}: expected 'file x1 y1 ... x5 y5' with a score or not, not {line.strip()!r}"
    )


def _numbers(fields: list[str]) -> list[float]:
    """The numbers that ``fields`` end in, save the first field."""
    numbers: list[float] = []
    for text in reversed(fields[1:]):
        try:
            numbers.append(float(text))
        except ValueError:
            break
    return numbers[::-1]
