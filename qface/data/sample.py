"""A few images of many, for what looks at a sample: calibration, sensitivity, pruning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qface.checks import check_whole
from qface.data.images import ImageSource, IndexedImages
from qface.errors import ImagesError

__all__ = ["evenly", "sample_batches"]


def evenly(length: int, count: int) -> Tensor:
    """Up to ``count`` indices below ``length``, evenly spread."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().long()


def sample_batches(source: ImageSource, num_images: int, batch_size: int) -> list[Tensor]:
    """About ``num_images`` images: every k-th of what can be indexed, else the first batches.

    Raises:
        ConfigError: ``num_images`` or ``batch_size`` is below 1.
        ImagesError: the images cannot be used, there are none, they differ in size or type, or a value of theirs is not
            finite.
    """
    check_whole(1, num_images=num_images, batch_size=batch_size)
    batches = list(_sample(source, num_images, batch_size))
    if not sum(map(len, batches)):
        raise ImagesError("there are no images to look at; pass at least one")
    kinds = {(batch.dtype, *batch.shape[1:]) for batch in batches}
    if len(kinds) > 1:
        raise ImagesError(
            "the images differ: "
            + ", ".join(f"{kind[0]} {list(kind[1:])}" for kind in sorted(kinds, key=str))
            + "; pass images of one size and type"
        )
    if any(batch.is_floating_point() and not batch.isfinite().all() for batch in batches):
        raise ImagesError("the images hold values that are not finite: look at how they are normalized")
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
