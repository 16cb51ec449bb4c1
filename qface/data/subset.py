"""Random subsets of images, to measure how accuracy depends on their number."""

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
    """Images of ``source`` at ``indices``, with their labels.

    Args:
        source: all images.
        indices: indices of the images of the subset, in its order.
    """

    def __init__(self, source: IndexedImages, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.labels = None if source.labels is None else source.labels[torch.tensor(self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images at ``indices`` of this subset."""
        return self.source.read([self.indices[index] for index in indices])

    def content(self, index: int) -> bytes:
        """Return the content of the image in the source."""
        return self.source.content(self.indices[index])


def nested_subset(
    images: Images, fraction_or_count: float | Fraction, seed: int = 0, identities: str | Path | None = None
) -> Subset:
    """Draw a random subset of the images (not of the identities).

    With the same seed, a smaller subset is contained in each larger one.

    Args:
        images: a folder, a tensor, or another source with indices.
        fraction_or_count: number of images (``int``), or fraction of them (``float``, ``Fraction``) in (0, 1], rounded
            down in decimal: 0.29 of 100 images is 29. ``1`` is one image, ``1.0`` is all images.
        seed: random seed.
        identities: identities to use from a folder; see :func:`qface.data.select_identities`.

    Returns:
        The images in the order of ``images``, with their labels.

    Raises:
        ImagesError: the images have no indices, or the number of images is out of range.
    """
    source = as_image_source(images, identities)
    if not isinstance(source, IndexedImages):
        raise ImagesError("a subset needs images with indices: pass a folder or a tensor, not a loader")
    count = _count(fraction_or_count, len(source))
    return Subset(source, np.sort(np.random.default_rng(seed).permutation(len(source))[:count]).tolist())


def _count(fraction_or_count: float | Fraction, images: int) -> int:
    if isinstance(fraction_or_count, Integral):
        if not 0 < fraction_or_count <= images:
            raise ImagesError(f"the number of images must be from 1 to {images}, got {fraction_or_count}")
        return int(fraction_or_count)
    if not 0 < fraction_or_count <= 1:
        raise ImagesError(f"the fraction of images must be > 0 and <= 1, got {fraction_or_count}")
    # Computed in decimal, since the binary 0.29 is smaller and 0.29 * 100 would be rounded down to 28.
    count = int(Fraction(str(fraction_or_count)) * images)
    if count == 0:
        raise ImagesError(f"a fraction of {fraction_or_count} of {images} images is empty: choose a larger one")
    return count
