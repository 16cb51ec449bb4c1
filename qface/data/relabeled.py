"""The same images with other labels, or with none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qface.data.images import IndexedImages, identity_labels

__all__ = ["Relabeled"]


class Relabeled(IndexedImages):
    """The images of ``source``, with ``labels`` in the place of its own.

    Args:
        source: the images.
        labels: identities, int64 [len(source)], or None to forget who is who.

    Raises:
        ImagesError: there are more labels or fewer than images, or they are no whole numbers from 0 on.
    """

    def __init__(self, source: IndexedImages, labels: Tensor | None) -> None:
        self.source = source
        self.labels = None if labels is None else identity_labels(labels, len(source))

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``."""
        return self.source.read(indices)

    def content(self, index: int) -> bytes:
        """That of the image in the source."""
        return self.source.content(index)
