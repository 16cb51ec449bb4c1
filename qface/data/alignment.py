"""From a photo and five landmarks to the aligned 112x112 crop that face networks read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from qface.errors import ImagesError
from qface.preprocessing import CROP_SIZE

__all__ = ["ARCFACE_LANDMARKS", "Landmarks", "align_face", "similarity_transform"]

Landmarks = npt.NDArray[np.float64]
"""float64 [5, 2]: x and y in pixels of the left eye, the right eye, the nose, and both corners of the mouth.

Left and right are those of the viewer. A whole number is the middle of a pixel, as in OpenCV.
"""

ARCFACE_LANDMARKS: Landmarks = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where they lie in the crop (InsightFace, ``face_align.py``)."""


def similarity_transform(source: npt.ArrayLike, target: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The rotation, uniform scale and shift that take ``source`` to ``target`` with the least squared error.

    Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991,
    equations 34 to 43.

    Args:
        source: [points, 2], x and y.
        target: likewise.

    Returns:
        float64 [2, 3], to be multiplied with (x, y, 1).

    Raises:
        ImagesError: points are missing, not finite, or all in one place.
    """
    points, goals = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if points.shape != goals.shape or points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise ImagesError(f"landmarks are [points, 2], not {list(points.shape)} for {list(goals.shape)}")
    if not (np.isfinite(points).all() and np.isfinite(goals).all()):
        raise ImagesError("landmarks are not finite: detect them again")
    center, goal_center = points.mean(0), goals.mean(0)
    centered, goal_centered = points - center, goals - goal_center
    variance = np.square(centered).sum() / len(points)
    if variance <= np.finfo(np.float64).eps * max(1.0, float(np.square(points).max())):
        raise ImagesError("the landmarks lie in one place: detect them again")
    left, singular, right = np.linalg.svd(goal_centered.T @ centered / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # a face is turned, and not mirrored
    rotation = left @ np.diag(signs) @ right
    scale = float(singular @ signs) / variance
    return np.column_stack([scale * rotation, goal_center - scale * rotation @ center])


def align_face(photo: Image.Image, landmarks: npt.ArrayLike) -> Image.Image:
    """The 112x112 RGB crop in which ``landmarks`` lie as near as can be to :data:`ARCFACE_LANDMARKS`.

    Sampled bilinearly; what is outside the photo is black.

    Args:
        photo: an image of any size.
        landmarks: :data:`Landmarks` of one face in it.

    Raises:
        ImagesError: the landmarks are not five points that can be told apart.
    """
    if np.shape(landmarks) != ARCFACE_LANDMARKS.shape:
        raise ImagesError(f"a face has five landmarks [5, 2], not {list(np.shape(landmarks))}")
    to_photo = _inverse(similarity_transform(landmarks, ARCFACE_LANDMARKS))
    return photo.convert("RGB").transform(
        (CROP_SIZE, CROP_SIZE), Image.Transform.AFFINE, _in_pillow(to_photo), Image.Resampling.BILINEAR
    )


def _inverse(transform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = np.linalg.inv(transform[:, :2])
    return np.column_stack([linear, -linear @ transform[:, 2]])


def _in_pillow(transform: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """``transform`` for coordinates in which the middle of the first pixel is 0.5."""
    shifted = transform.copy()
    shifted[:, 2] += 0.5 - 0.5 * transform[:, :2].sum(1)
    return tuple(shifted.ravel().tolist())
