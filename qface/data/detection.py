"""Face detection in photos with the detectors of uniface (extra ``qface[align]``)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from qface.data.alignment import Landmarks
from qface.errors import DependencyError, one_line

__all__ = ["Detector", "default_detector", "main_face"]


class Detector(Protocol):
    """Interface of a face detector with five landmarks, as in uniface."""

    def detect(self, image: npt.NDArray[np.uint8], /) -> list[Any]:
        """Return the faces in ``image``, BGR [H, W, 3], with ``bbox`` (x1, y1, x2, y2) and ``landmarks``."""


def default_detector() -> Detector:
    """Return RetinaFace with a MobileNet backbone; its weights are downloaded once.

    Raises:
        DependencyError: uniface is not installed, or the weights cannot be downloaded.
    """
    try:
        from uniface import RetinaFace
    except ImportError as error:
        raise DependencyError(
            "face detection needs uniface: pip install 'qface[align]', or pass a landmark file"
        ) from error
    try:
        return RetinaFace()  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: an incomplete file with a wrong hash
        raise DependencyError(
            f"the weights of the detector cannot be downloaded ({one_line(error)}): pass a landmark file"
        ) from error


def main_face(detector: Detector, photo: Image.Image) -> Landmarks | None:
    """Return the landmarks of the main face of ``photo``; None without a face.

    The main face has the maximum of area - 2 * (squared distance to the photo's center), as in the LFW scripts of
    InsightFace and FaceNet.
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
