"""Image sources, from which the functions of the package read batches of images.

uint8 images (folders, tensors) are 112x112 RGB crops, which are normalized for each model. Float images (tensors,
loaders) are already normalized and are passed to the model unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qface.errors import ImagesError
from qface.preprocessing import CROP_SIZE, Preprocessing

__all__ = [
    "ImageSource",
    "Images",
    "IndexedImages",
    "Labels",
    "LoaderImages",
    "TensorImages",
    "batch_of",
    "bytes_of",
    "check_normalized",
    "identity_labels",
    "labels_of",
    "length_of",
    "named_content",
    "normalize",
]

Labels = npt.NDArray[np.int64]
Images = Union[str, Path, Tensor, Iterable[Any], "ImageSource"]
"""Images as users pass them; :func:`qface.data.as_image_source` converts them to an :class:`ImageSource`."""


class ImageSource(ABC):
    """Images that can be read sequentially in batches."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield each image once, in order, as uint8 or float batches [n, 3, H, W], n <= ``batch_size``."""


class IndexedImages(ImageSource):
    """Images that can be read by index, with optional identity labels."""

    labels: Tensor | None = None
    """int64 [len(self)], identities numbered from 0; None if unknown."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images at ``indices`` as one tensor [len(indices), 3, H, W]."""

    def content(self, index: int) -> bytes:
        """Return bytes that identify the image at ``index``: name and file content for images on disk."""
        return bytes_of(self.read([index]))

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the images in order in batches of ``batch_size``, beginning with index ``start``."""
        for first in range(start, len(self), batch_size):
            yield self.read(range(first, min(first + batch_size, len(self))))


class TensorImages(IndexedImages):
    """Images in a tensor in memory.

    Args:
        images: uint8 [N, 3, 112, 112] crops in RGB, or normalized floats [N, 3, H, W].
        labels: integers [N], identities numbered from 0; None if unknown.

    Raises:
        ImagesError: the tensor is empty or has another shape or dtype, or the labels do not match it.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        _check(images)
        self.images = images
        self.labels = None if labels is None else identity_labels(labels, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images at ``indices``."""
        return self.images[torch.as_tensor(list(indices), dtype=torch.int64)]


class LoaderImages(ImageSource):
    """Images from a DataLoader or another iterable of batches.

    Args:
        loader: yields tensors, or tuples that begin with a tensor, in the formats of :class:`TensorImages`.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the batches of the loader, which determines their size: ``batch_size`` is ignored."""
        return map(batch_of, self.loader)


def batch_of(item: Any) -> Tensor:
    """Return the images of an item of a loader: the item itself, or the first element of a tuple.

    Raises:
        ImagesError: it is not a tensor in one of the formats of :class:`TensorImages`.
    """
    batch = item[0] if isinstance(item, (tuple, list)) else item
    if not isinstance(batch, Tensor):
        raise ImagesError(f"a loader must yield tensors or (tensor, label) tuples, got {type(batch).__name__}")
    if batch.ndim == 3:
        raise ImagesError(
            f"a loader must yield batches [N, 3, H, W], got an image {list(batch.shape)}: wrap it in a DataLoader"
        )
    _check(batch)
    return batch


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ImagesError(f"images must have the shape [N, 3, height, width] with N > 0, got {list(images.shape)}")
    if images.dtype == torch.uint8 and tuple(images.shape[2:]) != (CROP_SIZE, CROP_SIZE):
        raise ImagesError(
            f"uint8 images must be {CROP_SIZE}x{CROP_SIZE} face crops, got {images.shape[2]}x{images.shape[3]}: "
            "align them, or pass normalized floats"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ImagesError(f"images must be uint8 crops or normalized floats, got {images.dtype}")


def bytes_of(tensor: Tensor) -> bytes:
    """Return the raw bytes of the values of ``tensor``."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def named_content(path: Path, name: str) -> bytes:
    """Return ``name`` and the content of the file ``path``.

    Raises:
        ImagesError: the file cannot be read.
    """
    try:
        return f"{name}\0".encode("utf-8", "surrogateescape") + path.read_bytes()
    except OSError as error:
        raise ImagesError(f"{path} cannot be read ({error.strerror}): restore it") from error


def labels_of(source: ImageSource) -> Labels | None:
    """Return the labels of ``source``, int64 [N], identities numbered from 0; None if unknown."""
    if not isinstance(source, IndexedImages) or source.labels is None:
        return None
    return source.labels.cpu().numpy().astype(np.int64)


def identity_labels(labels: Tensor, count: int) -> Tensor:
    """Return ``labels`` as int64 after checking that they fit ``count`` images.

    Raises:
        ImagesError: the shape is not [count], or a label is not an integer >= 0.
    """
    if labels.shape != (count,):
        raise ImagesError(f"{count} images need labels of shape [{count}], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or (labels < 0).any():
        raise ImagesError("labels must be integers >= 0, one number per identity")
    return labels.long()


def length_of(loader: Iterable[Any]) -> int | None:
    """Return the number of batches of ``loader``; None if unknown, as for an IterableDataset."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def normalize(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return images as float32 model input: uint8 images are normalized, float images are only checked.

    Args:
        batch: uint8 crops [N, 3, 112, 112] in RGB, or normalized floats [N, 3, H, W].
        preprocessing: the preprocessing of the model.

    Raises:
        ImagesError: floats are outside the range of ``preprocessing``; see :func:`check_normalized`.
    """
    if batch.dtype == torch.uint8:
        return preprocessing(batch)
    check_normalized(batch, preprocessing)
    return batch.float()


def check_normalized(batch: Tensor, preprocessing: Preprocessing) -> None:
    """Raise if float images were not normalized with ``preprocessing``.

    Normalized values are from (0 - mean) / std to (255 - mean) / std; one gray level more is allowed for rounding.
    Several images with all values in [0, 1] are refused too if that range includes negative values: they were only
    divided by 255.

    Args:
        batch: images [N, 3, H, W]; uint8 images are always accepted.
        preprocessing: the preprocessing of the model.

    Raises:
        ImagesError: values are outside the range; the message names both ranges.
    """
    if not batch.is_floating_point() or not batch.numel():
        return
    mean, std = (batch.new_tensor(values, dtype=torch.float32) for values in (preprocessing.mean, preprocessing.std))
    lowest_possible, highest_possible, level = -mean / std, (255 - mean) / std, 1 / std
    low, high = (extreme.float() for extreme in torch.aminmax(batch.transpose(0, 1).reshape(3, -1), dim=1))
    outside = bool((low < lowest_possible - level).any() or (high > highest_possible + level).any())
    lowest, highest = float(low.min()), float(high.max())
    within_one = len(batch) > 1 and 0 <= lowest < highest <= 1 and bool((lowest_possible < 0).all())
    if not outside and not within_one:
        return
    looks = _LOOKS[0] if lowest >= 0 and highest <= 1 else _LOOKS[1] if lowest >= 0 and highest <= 256 else ""
    raise ImagesError(
        f"the images have values from {lowest:.3g} to {highest:.3g}{looks}, but the Preprocessing of the network gives "
        f"{float(lowest_possible.min()):.3g} to {float(highest_possible.max()):.3g}: "
        "set the Preprocessing that normalized them, or pass uint8 RGB images"
    )


_LOOKS = (" (only divided by 255?)", " (not normalized?)")
