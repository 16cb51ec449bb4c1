"""Image sources: the verbs read batches of images from them, and tensors and loaders become such sources here.

Crops (a folder, or a uint8 tensor) are 112x112 RGB bytes that each model normalizes for itself; floats (a float
tensor, or a loader that yields them) are already normalized and reach the model as they are.
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
"""Images that users may pass; :func:`qface.data.sources.as_image_source` makes an :class:`ImageSource` of each."""


class ImageSource(ABC):
    """Images that can be read in order, batch by batch."""

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 or float tensors [n <= batch_size, 3, height, width], each image once, in order."""


class IndexedImages(ImageSource):
    """Images that can also be read in any order; ``labels`` gives each one's identity where that is known."""

    labels: Tensor | None = None
    """int64 [len(self)], identities numbered from 0, or None where they are unknown."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices`` as one tensor [len(indices), 3, height, width]."""

    def content(self, index: int) -> bytes:
        """Bytes that tell the image at ``index`` from others; sources on disk give name and content, undecoded."""
        return bytes_of(self.read([index]))

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """Yield the images from ``start`` on in order, ``batch_size`` at a time."""
        for first in range(start, len(self), batch_size):
            yield self.read(range(first, min(first + batch_size, len(self))))


class TensorImages(IndexedImages):
    """A tensor [N, 3, H, W] in memory: uint8 holds 112x112 crops, float is already normalized.

    Raises:
        ImagesError: the tensor is empty, or of another shape or type.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        _check(images)
        self.images = images
        self.labels = None if labels is None else identity_labels(labels, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``."""
        return self.images[torch.as_tensor(list(indices), dtype=torch.int64)]


class LoaderImages(ImageSource):
    """A DataLoader, or any iterable of batches: tensors, or tuples that begin with one.

    What it yields is held to what :class:`TensorImages` says, batch by batch.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The loader's own batches; it has decided their size, so ``batch_size`` is not used."""
        return map(batch_of, self.loader)


def batch_of(item: Any) -> Tensor:
    """The images of what a loader yields, a tensor or a tuple that begins with one.

    Raises:
        ImagesError: it is something else, or not what :class:`TensorImages` takes.
    """
    batch = item[0] if isinstance(item, (tuple, list)) else item
    if not isinstance(batch, Tensor):
        raise ImagesError(f"a loader of images yields tensors or (tensor, label) tuples, not {type(batch).__name__}")
    if batch.ndim == 3:
        raise ImagesError(
            f"a loader of images yields batches, not single images {list(batch.shape)}: wrap it in a DataLoader"
        )
    _check(batch)
    return batch


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ImagesError(
            f"images need the shape [N, 3, height, width] with N > 0; this tensor has {list(images.shape)}"
        )
    if images.dtype == torch.uint8 and tuple(images.shape[2:]) != (CROP_SIZE, CROP_SIZE):
        raise ImagesError(
            f"uint8 images are {CROP_SIZE}x{CROP_SIZE} face crops; these are {images.shape[2]}x{images.shape[3]}: "
            "align them, or pass normalized floats"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ImagesError(f"images are uint8 crops or normalized floats, not {images.dtype}")


def bytes_of(tensor: Tensor) -> bytes:
    """The values of ``tensor`` as they lie in memory."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def named_content(path: Path, name: str) -> bytes:
    """``name``, by which a source knows the file ``path``, and all that the file holds.

    Raises:
        ImagesError: it cannot be read.
    """
    try:
        return f"{name}\0".encode("utf-8", "surrogateescape") + path.read_bytes()
    except OSError as error:
        raise ImagesError(f"{path} cannot be read ({error.strerror}): restore it") from error


def labels_of(source: ImageSource) -> Labels | None:
    """Who is on each image, [N], identities numbered from 0; None where that is unknown."""
    if not isinstance(source, IndexedImages) or source.labels is None:
        return None
    return source.labels.cpu().numpy().astype(np.int64)


def identity_labels(labels: Tensor, count: int) -> Tensor:
    """``labels`` as the int64 identities [count] of as many images.

    Raises:
        ImagesError: there are more or fewer, or they are no whole numbers from 0 on.
    """
    if labels.shape != (count,):
        raise ImagesError(f"{count} images need {count} labels, not a tensor {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or (labels < 0).any():
        raise ImagesError("labels are whole numbers from 0 on, one for each person")
    return labels.long()


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches of ``loader``; None where it does not say, as a DataLoader of an IterableDataset."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def normalize(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images as a model with ``preprocessing`` reads them, float32: bytes are normalized for it, floats pass.

    Raises:
        ImagesError: floats were not normalized by ``preprocessing``; see :func:`check_normalized`.
    """
    if batch.dtype == torch.uint8:
        return preprocessing(batch)
    check_normalized(batch, preprocessing)
    return batch.float()


def check_normalized(batch: Tensor, preprocessing: Preprocessing) -> None:
    """Refuse floats that ``preprocessing`` makes of no byte, or that look like images of 0..1 where it means others.

    Bytes become the range from (0 - mean) / std to (255 - mean) / std of each channel; one gray level beyond it is
    taken for rounding. Several images that all lie within 0..1, where that range reaches below 0, were only divided
    by 255.

    Args:
        batch: [N, 3, height, width], bytes (which are never refused) or floats.
        preprocessing: that of the network that reads them.

    Raises:
        ImagesError: they are such floats; the message names both ranges.
    """
    if not batch.is_floating_point() or not batch.numel():
        return
    mean, std = (batch.new_tensor(values, dtype=torch.float32) for values in (preprocessing.mean, preprocessing.std))
    least, greatest, level = -mean / std, (255 - mean) / std, 1 / std
    low, high = (extreme.float() for extreme in torch.aminmax(batch.transpose(0, 1).reshape(3, -1), dim=1))
    outside = bool((low < least - level).any() or (high > greatest + level).any())
    lowest, highest = float(low.min()), float(high.max())
    within_one = len(batch) > 1 and 0 <= lowest < highest <= 1 and bool((least < 0).all())
    if not outside and not within_one:
        return
    looks = _LOOKS[0] if lowest >= 0 and highest <= 1 else _LOOKS[1] if lowest >= 0 and highest <= 256 else ""
    raise ImagesError(
        f"these images reach from {lowest:.3g} to {highest:.3g}{looks}, and this network's Preprocessing says "
        f"{float(least.min()):.3g} to {float(greatest.max()):.3g}: attach the one by which they were normalized, or "
        "pass bytes (uint8, RGB)"
    )


_LOOKS = (" as if only divided by 255", " as bytes do")
