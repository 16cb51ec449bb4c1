"""Finding faces in photos; the detectors are uniface's (extra ``qface[align]``)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from qface.data.alignment import Landmarks
from qface.errors import DependencyError, one_line

__all__ = ["Detector", "default_detector", "main_face"]


class Detector(Protocol):
    """The interface of uniface's detectors of five landmarks."""

    def detect(self, image: npt.NDArray[np.uint8], /) -> list[Any]:
        """The faces in ``image`` [height, width, 3], BGR, with ``bbox`` (x1, y1, x2, y2) and ``landmarks`` [5, 2]."""


def default_detector() -> Detector:
    """RetinaFace with the backbone MobileNet; its weights are fetched from the internet once.

    Raises:
        DependencyError: uniface is not installed, or its weights cannot be fetched.
    """
    try:
        from uniface import RetinaFace
    except ImportError as error:
        raise DependencyError(
            "finding faces needs uniface: pip install 'qface[align]', or give the landmarks of the photos"
        ) from error
    try:
        return RetinaFace()  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: half a file, which does not fit its hash
        raise DependencyError(
            f"the detector's weights cannot be fetched ({one_line(error)}): give the landmarks of the photos"
        ) from error


def main_face(detector: Detector, photo: Image.Image) -> Landmarks | None:
    """The landmarks of the face that ``photo`` is of, a large one near its middle; None where there is no face.

    Of several, the one whose area, less twice the squared distance from the middle of the photo, is largest, as in
    InsightFace's and FaceNet's scripts for LFW.
    """
    faces = detector.detect(np.ascontiguousarray(np.asarray(photo.convert("RGB"))[:, :, ::-1]))
    if not faces:
        return None
    middle = np.array(photo.size) / 2

    def prominence(face: Any) -> float:
        left, top, right, bottom = (float(value) for value in face.bbox[:4])
        offset = np.array([(left + right) / 2, (top + bottom) / 2]) - middle
        return (right - left) * (bottom - top) - 2 * float(offset @ offset)

    return np.asarray(max(faces, key=prominence).landmarks, np.float64)
