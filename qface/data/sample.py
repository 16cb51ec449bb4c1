"""Samples of an image source for calibration, sensitivity and pruning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qface.checks import check_whole
from qface.data.images import ImageSource, IndexedImages
from qface.errors import ImagesError

__all__ = ["evenly", "sample_batches"]


def evenly(length: int, count: int) -> Tensor:
    """Return up to ``count`` evenly spaced indices below ``length``."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().long()


def sample_batches(source: ImageSource, num_images: int, batch_size: int) -> list[Tensor]:
    """Read up to ``num_images`` images: evenly spaced if the source has indices, else the first ones.

    Raises:
        ConfigError: ``num_images`` or ``batch_size`` is not an integer >= 1.
        ImagesError: the images cannot be read, there are none, they differ in size or dtype, or a value is not finite.
    """
    check_whole(1, num_images=num_images, batch_size=batch_size)
    batches = list(_sample(source, num_images, batch_size))
    if not sum(map(len, batches)):
        raise ImagesError("there are no images; pass at least one")
    kinds = {(batch.dtype, *batch.shape[1:]) for batch in batches}
    if len(kinds) > 1:
        raise ImagesError(
            "the images differ in size or dtype: "
            + ", ".join(f"{kind[0]} {list(kind[1:])}" for kind in sorted(kinds, key=str))
            + "; pass images of one size and dtype"
        )
    if any(batch.is_floating_point() and not batch.isfinite().all() for batch in batches):
        raise ImagesError("the images contain NaN or infinity: check how they are normalized")
    return batches


def _sample(source: ImageSource, num_images: int, batch_size: int) -> Iterator[Tensor]:
    if isinstance(source, IndexedImages):
        indices = evenly(len(source), num_images).tolist()
        for start in range(0, len(indices), batch_size):
            yield source.read(indices[start : start + batch_size])
        return
    seen = 0
    for batch in source.batches(batch_size):
        yield batch[: num_images - seen]
        seen += len(batch)
        if seen >= num_images:
            return
