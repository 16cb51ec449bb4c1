"""Alignment of a face by five landmarks to the 112x112 ArcFace template."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from qface.errors import ImagesError
from qface.preprocessing import CROP_SIZE

__all__ = ["ARCFACE_LANDMARKS", "Landmarks", "align_face", "landmark_fault", "similarity_transform"]

Landmarks = npt.NDArray[np.float64]
"""float64 [5, 2]: x and y in pixels of left eye, right eye, nose, left and right corner of the mouth.

Left and right are as seen by the viewer. Integer coordinates are pixel centers, as in OpenCV.
"""

ARCFACE_LANDMARKS: Landmarks = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Landmarks of the ArcFace template in the 112x112 crop (InsightFace, ``face_align.py``)."""


def similarity_transform(source: npt.ArrayLike, target: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the least-squares similarity transform from ``source`` to ``target``.

    It consists of rotation, uniform scale and translation. Umeyama, Least-squares estimation of transformation
    parameters between two point patterns, PAMI 1991, equations 34 to 43.

    Args:
        source: points [N, 2], x and y, N >= 2.
        target: their target positions, [N, 2].

    Returns:
        float64 [2, 3], to multiply with (x, y, 1).

    Raises:
        ImagesError: the shapes are wrong, or the points are not finite or all equal.
    """
    points, goals = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if points.shape != goals.shape or points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise ImagesError(
            f"landmarks must be two arrays [N, 2], N >= 2, got {list(points.shape)} and {list(goals.shape)}"
        )
    if not (np.isfinite(points).all() and np.isfinite(goals).all()):
        raise ImagesError("landmarks contain NaN or infinity: detect them again")
    center, goal_center = points.mean(0), goals.mean(0)
    centered, goal_centered = points - center, goals - goal_center
    variance = np.square(centered).sum() / len(points)
    if variance <= np.finfo(np.float64).eps * max(1.0, float(np.square(points).max())):
        raise ImagesError("all landmarks are at the same point: detect them again")
    left, singular, right = np.linalg.svd(goal_centered.T @ centered / len(points))
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])  # no mirroring
    rotation = left @ np.diag(signs) @ right
    scale = float(singular @ signs) / variance
    return np.column_stack([scale * rotation, goal_center - scale * rotation @ center])


def align_face(photo: Image.Image, landmarks: npt.ArrayLike) -> Image.Image:
    """Return the 112x112 RGB crop of a face, aligned to :data:`ARCFACE_LANDMARKS`.

    The photo is sampled bilinearly; pixels outside it are black.

    Args:
        photo: an image of any size.
        landmarks: :data:`Landmarks` of one face, in pixels of the photo.

    Raises:
        ImagesError: the landmarks are not five distinct, finite points.
    """
    if np.shape(landmarks) != ARCFACE_LANDMARKS.shape:
        raise ImagesError(f"landmarks must have the shape [5, 2], got {list(np.shape(landmarks))}")
    to_photo = _inverse(similarity_transform(landmarks, ARCFACE_LANDMARKS))
    return photo.convert("RGB").transform(
        (CROP_SIZE, CROP_SIZE), Image.Transform.AFFINE, _in_pillow(to_photo), Image.Resampling.BILINEAR
    )


_MAX_RESIDUAL = 18.5
"""Maximum RMS distance to the template in crop pixels. A rigid face with yaw up to 90 degrees, pitch up to 30 degrees
and landmark errors of 1.5 pixels gives 15.9 to 18.5; swapped eyes give 18.1 to 19.6, a mirrored face 21.4."""
_MAX_CROSSED = 1.0
"""Maximum crossed area relative to the squared RMS radius of the landmarks. Those rigid faces stay below 0.9."""
_MAX_ROLL = 120.0  # maximum, degrees
_OTHER_ORDERS: dict[str, list[int]] = {
    "x1 ... x5 y1 ... y5 (the order of MTCNN)": [0, 5, 1, 6, 2, 7, 3, 8, 4, 9],
    "y before x": [1, 0, 3, 2, 5, 4, 7, 6, 9, 8],
    "the viewer's right before the left": [2, 3, 0, 1, 4, 5, 8, 9, 6, 7],
    "the mouth before the eyes": [6, 7, 8, 9, 4, 5, 0, 1, 2, 3],
    "the right eye first": [2, 3, 0, 1, 4, 5, 6, 7, 8, 9],
    "the right corner of the mouth first": [0, 1, 2, 3, 4, 5, 8, 9, 6, 7],
}


def landmark_fault(landmarks: Landmarks, size: tuple[int, int] | None = None) -> str | None:
    """Return the reason why ``landmarks`` cannot be a face in a photo; None if they can.

    Profile faces pass. Landmarks of a different face in the same photo are not detected.

    Args:
        landmarks: five distinct points.
        size: (width, height) of the photo in pixels; None skips the check that the landmarks are in the photo.
    """
    if size is not None and (reason := _outside(landmarks, size)):
        return reason
    residual, roll = _fit(landmarks)
    values = landmarks.ravel()
    others = {name: _fit(values[order].reshape(5, 2))[0] for name, order in _OTHER_ORDERS.items()}
    likely = min(others, key=others.__getitem__)
    if others[likely] < residual / 2:
        return f"their order looks like {likely}"
    if residual > _MAX_RESIDUAL:
        return f"they are {residual:.0f} pixels (RMS) from the template in the 112x112 crop"
    if roll > _MAX_ROLL:
        return "the eyes are below the mouth"
    return _crossed(landmarks)


def _outside(landmarks: Landmarks, size: tuple[int, int]) -> str | None:
    """Return the reason if ``landmarks`` are outside a photo of (width, height) ``size``."""
    if landmarks.min() >= 0 and landmarks.max() <= 1 < min(size):
        return "they are between 0 and 1, but must be in pixels"
    margin = _spread(landmarks)  # the photo may cut off part of the face
    low, high = landmarks.min(0), landmarks.max(0)
    if (low < -margin).any() or (high > np.array(size) + margin).any():
        return (
            f"they extend from ({low[0]:.0f}, {low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}) in a photo of "
            f"{size[0]}x{size[1]}"
        )
    return None


def _fit(landmarks: Landmarks) -> tuple[float, float]:
    """Return the RMS distance to the template in crop pixels and the absolute roll in degrees."""
    try:
        transform = similarity_transform(landmarks, ARCFACE_LANDMARKS)
    except ImagesError:  # a different order of the numbers may give five equal points
        return float("inf"), 0.0
    moved = landmarks @ transform[:, :2].T + transform[:, 2]
    residual = float(np.sqrt(np.square(moved - ARCFACE_LANDMARKS).sum(1).mean()))
    return residual, abs(float(np.degrees(np.arctan2(transform[1, 0], transform[0, 0]))))


def _crossed(landmarks: Landmarks) -> str | None:
    left, right, _, mouth_left, mouth_right = landmarks
    eyes, mouth = right - left, mouth_right - mouth_left
    down = (mouth_left + mouth_right) / 2 - (left + right) / 2
    area = _MAX_CROSSED * _spread(landmarks) ** 2
    if _cross(eyes, down) < -area:
        return "the left eye is to the right of the right eye"
    if _cross(mouth, down) < -area:
        return "the left corner of the mouth is to the right of the right corner"
    return "the lines of the eyes and of the mouth cross" if abs(_cross(eyes, mouth)) > area else None


def _cross(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(one[0] * other[1] - one[1] * other[0])


def _spread(landmarks: Landmarks) -> float:
    """Return the RMS distance of the landmarks from their mean."""
    return float(np.sqrt(np.square(landmarks - landmarks.mean(0)).sum(1).mean()))


def _inverse(transform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = np.linalg.inv(transform[:, :2])
    return np.column_stack([linear, -linear @ transform[:, 2]])


def _in_pillow(transform: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Convert ``transform`` to Pillow's coordinates, in which the center of the first pixel is 0.5."""
    shifted = transform.copy()
    shifted[:, 2] += 0.5 - 0.5 * transform[:, :2].sum(1)
    return tuple(shifted.ravel().tolist())
