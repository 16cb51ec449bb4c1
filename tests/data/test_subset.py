from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qface.data import LoaderImages, TensorImages, nested_subset
from qface.errors import ImagesError


def numbered(count: int) -> TensorImages:
    """Images whose pixels and labels are their number."""
    numbers = torch.arange(count)
    return TensorImages(numbers.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels=numbers)


@given(st.integers(1, 200), st.integers(1, 100), st.integers(1, 100), st.integers(0, 5))
def test_subsets_have_the_floor_of_the_share_and_lie_in_each_other(count: int, one: int, other: int, seed: int) -> None:
    images = numbered(count)
    small, large = sorted((one, other))
    if small * count < 100:
        with pytest.raises(ImagesError, match="is empty"):
            nested_subset(images, Fraction(small, 100), seed)
        return
    few, many = (nested_subset(images, percent / 100, seed) for percent in (small, large))
    assert (len(few), len(many)) == (small * count // 100, large * count // 100)
    assert set(few.indices) <= set(many.indices)
    assert many.indices == sorted(set(many.indices))
    assert torch.equal(many.read(range(len(many)))[:, 0, 0, 0].long(), many.labels)
    assert many.labels.tolist() == many.indices


def test_the_seed_chooses() -> None:
    images = numbered(100)
    assert nested_subset(images, 0.3, 1).indices == nested_subset(images, 0.3, 1).indices
    assert nested_subset(images, 0.3, 1).indices != nested_subset(images, 0.3, 2).indices


def test_a_whole_number_counts_images_and_the_same_draw_gives_a_fraction_of_them() -> None:
    images = numbered(100)
    assert len(nested_subset(images, 1)) == 1
    assert len(nested_subset(images, 1.0)) == 100
    assert nested_subset(images, 29, 3).indices == nested_subset(images, 0.29, 3).indices


def test_without_labels_there_are_none() -> None:
    assert nested_subset(torch.zeros(4, 3, 2, 2), 0.5).labels is None


@pytest.mark.parametrize("fraction_or_count", [0, -1, 11, 0.0, -0.5, 1.01, float("nan"), Fraction(11, 10)])
def test_what_cannot_be_drawn(fraction_or_count: float | Fraction) -> None:
    with pytest.raises(ImagesError, match="images must be"):
        nested_subset(numbered(10), fraction_or_count)


def test_a_loader_has_no_subset() -> None:
    with pytest.raises(ImagesError, match="images with indices"):
        nested_subset(LoaderImages([torch.zeros(1, 3, 4, 4)]), 0.5)
