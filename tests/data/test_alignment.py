"""Alignment against scikit-image, and on real faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from qface.data.alignment import ARCFACE_LANDMARKS, align_face, similarity_transform
from qface.errors import ImagesError

COORDINATES = st.floats(-500, 500, allow_subnormal=False)


@given(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=5, max_size=5, unique=True))
def test_similarity_transform_is_scikit_images(points: list[tuple[float, float]]) -> None:
    source = np.array(points)
    spread = np.linalg.svd(source - source.mean(0), compute_uv=False)
    if spread[1] < 1:  # collinear: there the two differ, and a face is not
        return
    expected = SimilarityTransform.from_estimate(source, ARCFACE_LANDMARKS)
    np.testing.assert_allclose(similarity_transform(source, ARCFACE_LANDMARKS), expected.params[:2], atol=1e-6)


@given(st.floats(0.1, 10), st.floats(-3.1, 3.1), st.floats(-300, 300), st.floats(-300, 300))
def test_similarity_transform_recovers_what_was_done(scale: float, angle: float, x: float, y: float) -> None:
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = ARCFACE_LANDMARKS @ rotation.T + (x, y)
    found = similarity_transform(ARCFACE_LANDMARKS, moved)
    np.testing.assert_allclose(found, np.column_stack([rotation, (x, y)]), atol=1e-8)


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.full((5, 2), np.nan), np.zeros((5, 3)), np.zeros((1, 2))])
def test_points_that_say_nothing_are_refused(points) -> None:
    with pytest.raises(ImagesError, match="landmarks"):
        similarity_transform(points, points)


def test_four_landmarks_are_no_face() -> None:
    with pytest.raises(ImagesError, match=r"shape \[5, 2\], got \[4, 2\]"):
        align_face(Image.new("RGB", (50, 50)), ARCFACE_LANDMARKS[:4])


def photo(width: int = 420, height: int = 400) -> np.ndarray:
    """Smooth, so that how pixels are interpolated hardly matters, and different everywhere."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 23 + y / 31), np.cos(x / 17), np.sin(y / 29)]
    return np.round(127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.9])
@pytest.mark.parametrize("angle", [-0.5, 0.0, 0.3])
def test_crop_is_scikit_images(scale: float, angle: float) -> None:
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (ARCFACE_LANDMARKS - 56) @ rotation.T + (210, 200)
    pixels = photo()
    crop = np.asarray(align_face(Image.fromarray(pixels), landmarks), np.float64)
    transform = SimilarityTransform.from_estimate(landmarks, ARCFACE_LANDMARKS)
    expected = 255 * warp(pixels, transform.inverse, output_shape=(112, 112), order=1)
    assert crop.shape == (112, 112, 3)
    assert np.abs(crop - expected).max() <= 1.01


def test_what_lies_outside_the_photo_is_black() -> None:
    crop = np.asarray(align_face(Image.fromarray(np.full((60, 112, 3), 200, np.uint8)), ARCFACE_LANDMARKS))
    assert (crop[:59] == 200).all()
    assert (crop[61:] == 0).all()


def test_a_crop_with_the_template_as_landmarks_stays_as_it_is(crops) -> None:
    folder: Path = crops({"Ann": 1})
    original = Image.open(folder / "Ann" / "Ann_0001.png")
    assert np.abs(np.asarray(align_face(original, ARCFACE_LANDMARKS), int) - np.asarray(original, int)).max() <= 1
