"""Images with replaced or removed labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qface.data.images import IndexedImages, identity_labels

__all__ = ["Relabeled"]


class Relabeled(IndexedImages):
    """Images of ``source`` with other labels.

    Args:
        source: the images.
        labels: int64 [len(source)], identities numbered from 0; None for no labels.

    Raises:
        ImagesError: the number of labels is wrong, or they are not integers >= 0.
    """

    def __init__(self, source: IndexedImages, labels: Tensor | None) -> None:
        self.source = source
        self.labels = None if labels is None else identity_labels(labels, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images at ``indices``."""
        return self.source.read(indices)

    def content(self, index: int) -> bytes:
        """Return the content of the image in the source."""
        return self.source.content(index)
