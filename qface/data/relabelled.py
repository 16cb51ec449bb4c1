"""The same images with other labels, or with none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qface.data.images import IndexedImages
from qface.errors import ImagesError

__all__ = ["Relabelled"]


class Relabelled(IndexedImages):
    """The images of ``source``, with ``labels`` in the place of its own.

    Args:
        source: the images.
        labels: identities, int64 [len(source)], or None to forget who is who.

    Raises:
        ImagesError: there are more labels or fewer than images.
    """

    def __init__(self, source: IndexedImages, labels: Tensor | None) -> None:
        if labels is not None and labels.shape != (len(source),):
            raise ImagesError(f"{len(source)} images need {len(source)} labels, not a tensor {list(labels.shape)}")
        self.source = source
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``."""
        return self.source.read(indices)
