from __future__ import annotations

import pytest
import torch

from qface.data import TensorImages
from qface.data.relabeled import Relabeled
from qface.errors import ImagesError


def test_labels_are_replaced_or_forgotten_and_images_stay() -> None:
    images = TensorImages(torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 2]))
    labels = torch.tensor([0, 0, 1])
    other = Relabeled(images, labels)
    assert other.labels is labels
    assert Relabeled(images, None).labels is None
    assert len(other) == 3
    assert torch.equal(other.read([2, 0]), images.read([2, 0]))


def test_each_image_needs_a_label() -> None:
    with pytest.raises(ImagesError, match=r"3 images need labels of shape \[3\], got \[2\]"):
        Relabeled(TensorImages(torch.rand(3, 3, 2, 2)), torch.tensor([0, 1]))
