"""From a photo and five landmarks to the aligned 112x112 crop that face networks read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from qface.errors import ImagesError
from qface.preprocessing import CROP_SIZE

__all__ = ["ARCFACE_LANDMARKS", "Landmarks", "align_face", "landmark_fault", "similarity_transform"]

Landmarks = npt.NDArray[np.float64]
"""float64 [5, 2]: x and y in pixels of the left eye, the right eye, the nose, and both corners of the mouth.

Left and right are those of the viewer. A whole number is the middle of a pixel, as in OpenCV.
"""

ARCFACE_LANDMARKS: Landmarks = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Their coordinates in the crop (InsightFace, ``face_align.py``)."""


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


_MOST_RESIDUAL = 18.5
"""Pixels of the crop, root mean square. A rigid face turned by up to 90 degrees and tilted by up to 30 leaves at most
15.9 to 18.5 with an error of 1.5 pixels in each landmark; swapped eyes leave 18.1 to 19.6, a mirrored face 21.4."""
_MOST_CROSSED = 1.0
"""Areas in squares of the landmarks' root mean square distance from their middle. Such faces stay below 0.9."""
_MOST_ROLL = 120.0  # degrees
_OTHER_ORDERS: dict[str, list[int]] = {
    "x1 ... x5 y1 ... y5, as MTCNN gives them": [0, 5, 1, 6, 2, 7, 3, 8, 4, 9],
    "y before x": [1, 0, 3, 2, 5, 4, 7, 6, 9, 8],
    "the viewer's right before the left": [2, 3, 0, 1, 4, 5, 8, 9, 6, 7],
    "the mouth before the eyes": [6, 7, 8, 9, 4, 5, 0, 1, 2, 3],
    "the right eye first": [2, 3, 0, 1, 4, 5, 6, 7, 8, 9],
    "the right corner of the mouth first": [0, 1, 2, 3, 4, 5, 8, 9, 6, 7],
}


def landmark_fault(landmarks: Landmarks, size: tuple[int, int] | None = None) -> str | None:
    """Why ``landmarks`` cannot be those of a face in a photo, in a few words; None where they can.

    Profile faces pass. Landmarks of which one is not told from another by any face, such as those of a second face in
    the photo, are not noticed.

    Args:
        landmarks: five points that can be told apart.
        size: width and height of the photo in pixels; None leaves out whether they lie in it.
    """
    if size is not None and (reason := _outside(landmarks, size)):
        return reason
    residual, roll = _fit(landmarks)
    values = landmarks.ravel()
    others = {name: _fit(values[order].reshape(5, 2))[0] for name, order in _OTHER_ORDERS.items()}
    likely = min(others, key=others.__getitem__)
    if others[likely] < residual / 2:
        return f"they look like {likely}"
    if residual > _MOST_RESIDUAL:
        return f"they fit no face: {residual:.0f} pixels off in the 112x112 crop"
    if roll > _MOST_ROLL:
        return "the eyes lie below the mouth"
    return _crossed(landmarks)


def _outside(landmarks: Landmarks, size: tuple[int, int]) -> str | None:
    """A landmark may lie beyond the border by as much as the face is large, where a photo cuts it off."""
    if landmarks.min() >= 0 and landmarks.max() <= 1 < min(size):
        return "they lie within 0..1, and are read as pixels"
    margin = _spread(landmarks)
    low, high = landmarks.min(0), landmarks.max(0)
    if (low < -margin).any() or (high > np.array(size) + margin).any():
        return f"they reach to {high[0]:.0f}, {high[1]:.0f} in a photo of {size[0]}x{size[1]}"
    return None


def _fit(landmarks: Landmarks) -> tuple[float, float]:
    """Root mean square distance to the template in pixels of the crop, and the roll in degrees, without sign."""
    try:
        transform = similarity_transform(landmarks, ARCFACE_LANDMARKS)
    except ImagesError:  # another order of the numbers may put all of them in one place
        return float("inf"), 0.0
    moved = landmarks @ transform[:, :2].T + transform[:, 2]
    residual = float(np.sqrt(np.square(moved - ARCFACE_LANDMARKS).sum(1).mean()))
    return residual, abs(float(np.degrees(np.arctan2(transform[1, 0], transform[0, 0]))))


def _crossed(landmarks: Landmarks) -> str | None:
    left, right, _, mouth_left, mouth_right = landmarks
    eyes, mouth = right - left, mouth_right - mouth_left
    down = (mouth_left + mouth_right) / 2 - (left + right) / 2
    area = _MOST_CROSSED * _spread(landmarks) ** 2
    if _cross(eyes, down) < -area:
        return "the left eye lies right of the right one"
    if _cross(mouth, down) < -area:
        return "the left corner of the mouth lies right of the right one"
    return "the eyes and the mouth lie across each other" if abs(_cross(eyes, mouth)) > area else None


def _cross(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(one[0] * other[1] - one[1] * other[0])


def _spread(landmarks: Landmarks) -> float:
    """Root mean square distance of the landmarks from their middle."""
    return float(np.sqrt(np.square(landmarks - landmarks.mean(0)).sum(1).mean()))


def _inverse(transform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = np.linalg.inv(transform[:, :2])
    return np.column_stack([linear, -linear @ transform[:, 2]])


def _in_pillow(transform: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """``transform`` for coordinates in which the middle of the first pixel is 0.5."""
    shifted = transform.copy()
    shifted[:, 2] += 0.5 - 0.5 * transform[:, :2].sum(1)
    return tuple(shifted.ravel().tolist())
