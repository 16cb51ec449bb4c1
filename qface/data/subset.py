"""Part of the images: how accuracy depends on how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qface.data.images import Images, IndexedImages
from qface.data.sources import as_image_source
from qface.errors import ImagesError

__all__ = ["Subset", "nested_subset"]


class Subset(IndexedImages):
    """The images of ``source`` at ``indices``, with their labels.

    Args:
        source: all images.
        indices: which of them, in their order here.
    """

    def __init__(self, source: IndexedImages, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.labels = None if source.labels is None else source.labels[torch.tensor(self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices`` of this subset, as one tensor."""
        return self.source.read([self.indices[index] for index in indices])

    def content(self, index: int) -> bytes:
        """That of the image in the source."""
        return self.source.content(self.indices[index])


def nested_subset(
    images: Images, fraction_or_count: float | Fraction, seed: int = 0, identities: str | Path | None = None
) -> Subset:
    """Some of the images, drawn at random: images and not people.

    Of one seed, a smaller subset is part of each larger one.

    Args:
        images: a folder, a tensor, or anything else that can be read in any order.
        fraction_or_count: a whole number of images (``int``), or a fraction of them (``float``, ``Fraction``) above 0
            and up to 1, rounded down; ``0.29`` of 100 images are 29, as the decimal says. ``1`` is one image, ``1.0``
            are all.
        seed: of the draw.
        identities: of a folder, which identities.

    Returns:
        The chosen images in the order of ``images``, with their labels.

    Raises:
        ImagesError: the images cannot be read in any order, or there are none, or not so many.
    """
    source = as_image_source(images, identities)
    if not isinstance(source, IndexedImages):
        raise ImagesError("a subset needs images that can be read in any order: a folder or a tensor")
    count = _count(fraction_or_count, len(source))
    return Subset(source, np.sort(np.random.default_rng(seed).permutation(len(source))[:count]).tolist())


def _count(fraction_or_count: float | Fraction, images: int) -> int:
    if isinstance(fraction_or_count, Integral):
        if not 0 < fraction_or_count <= images:
            raise ImagesError(f"{fraction_or_count} of {images} images cannot be drawn: choose 1 to {images}")
        return int(fraction_or_count)
    if not 0 < fraction_or_count <= 1:
        raise ImagesError(f"a fraction of {fraction_or_count} cannot be drawn: choose one above 0 and up to 1")
    # As written in decimals: the binary 0.29 lies below, and 0.29 x 100 would be 28.
    count = int(Fraction(str(fraction_or_count)) * images)
    if count == 0:
        raise ImagesError(f"a fraction of {fraction_or_count} of {images} images leaves none: choose a larger one")
    return count
