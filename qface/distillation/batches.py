"""The endless stream of training batches, from images that can be read in any order or from a loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qface.data.augmentation import augmented
from qface.data.images import ImageSource, IndexedImages, LoaderImages, batch_of, identity_labels, length_of
from qface.data.sample import evenly
from qface.distillation.batch_sampler import PairSampler, flips
from qface.distillation.distill_config import DistillConfig
from qface.errors import ConfigError, ImagesError
from qface.parallel import Parallel

__all__ = ["Batch", "Batches", "batches_of"]


class Batch(NamedTuple):
    """Images and labels of one process in one step."""

    images: Tensor
    """This process's share of the batch, uint8 or float [n / processes, 3, height, width]."""

    labels: Tensor | None
    """Identities of the whole batch, int64 [n], or None where they are unknown."""


class Batches(ABC):
    """Batches by step number: a stream from step k on equals one from step 0 without its first k batches."""

    steps_per_epoch: int | None
    """None where it is unknown."""

    num_identities: int | None = None
    """Number of identities, or None where they are unknown."""

    lacks_positives: bool = False
    """True if it is known that the images hold no two of one person."""

    @abstractmethod
    def stream(self, start: int) -> Iterator[Batch]:
        """Yield the batches of step ``start`` and all later ones, without end."""

    @abstractmethod
    def examples(self, count: int) -> Tensor:
        """Up to ``count`` images [n, 3, height, width], the same in each process, to see what networks make of them."""


def batches_of(source: ImageSource, config: DistillConfig, parallel: Parallel) -> Batches:
    """The training batches of ``source``.

    Raises:
        ConfigError: several processes cannot share the images or the batch size.
        ImagesError: there are too few images, or a loader that is exhausted after one pass.
    """
    if isinstance(source, IndexedImages):
        return _IndexedBatches(source, config, parallel)
    if parallel.world_size > 1:
        raise ConfigError("several processes need images that can be read in any order: a folder or a tensor")
    loader = source.loader if isinstance(source, LoaderImages) else _InOrder(source, config.batch_size)
    return _LoaderBatches(loader, config)


class _IndexedBatches(Batches):
    """Pairs drawn by :class:`PairSampler`; each process reads its own slice of every batch."""

    def __init__(self, source: IndexedImages, config: DistillConfig, parallel: Parallel) -> None:
        size = _batch_size(len(source), config.batch_size, parallel.world_size)
        self._source = source
        pairs_of = source.labels if config.uses_ekd else None
        self._sampler = PairSampler(len(source), pairs_of, size, config.seed)
        self._config = config
        share = size // parallel.world_size
        self._share = slice(parallel.rank * share, (parallel.rank + 1) * share)
        self.steps_per_epoch = self._sampler.steps
        self.lacks_positives = not self._sampler.has_positives
        self.num_identities = None if source.labels is None else int(source.labels.max()) + 1

    def stream(self, start: int) -> Iterator[Batch]:
        epoch, skipped = divmod(start, self._sampler.steps)
        batches = chain.from_iterable(self._sampler.epoch(number) for number in count(epoch))
        for step, indices in enumerate(islice(batches, skipped, None), start):
            yield self._read(indices, step)

    def _read(self, indices: list[int], step: int) -> Batch:
        # Where images may be mixed, one more than this process's share: the last one meets the one after it.
        extra = int(self._config.augmentation is not None)
        places = [place % len(indices) for place in range(self._share.start, self._share.stop + extra)]
        images = self._source.read([indices[place] for place in places])
        if self._config.horizontal_flip:
            images = _flipped(images, flips(len(indices), self._config.seed, step)[places])
        if extra:
            images = _augmented(images[:-1], images[1:], self._config, step, self._share.start)
        labels = self._source.labels
        return Batch(images, None if labels is None else labels[torch.tensor(indices, device=labels.device)])

    def examples(self, count: int) -> Tensor:
        return self._source.read(evenly(len(self._source), count).tolist())


def _batch_size(images: int, wanted: int, processes: int) -> int:
    if wanted % processes:
        raise ConfigError(f"batch_size {wanted} cannot be shared by {processes} processes: choose a multiple of it")
    size = min(wanted, images - images % processes)
    if size < 2:
        raise ImagesError(f"{images} images are too few to distill from: EKD compares pairs, so give more images")
    return size


class _LoaderBatches(Batches):
    """A loader's own batches in its own order, again and again, but for those of one image: neither a pair nor the
    statistics of a batch norm can be made of it, and the last batch of a loader may be one."""

    def __init__(self, loader: Iterable[Any], config: DistillConfig) -> None:
        if iter(loader) is loader:
            raise ImagesError("a generator is exhausted after one pass: give a DataLoader or a list of batches")
        self._loader = loader
        self._config = config
        self.steps_per_epoch = length_of(loader)

    def stream(self, start: int) -> Iterator[Batch]:
        for step, (images, labels) in enumerate(islice(self._batches(), start, None), start):
            if self._config.horizontal_flip:
                images = _flipped(images, flips(len(images), self._config.seed, step))
            yield Batch(_augmented(images, images.roll(-1, 0), self._config, step, 0), labels)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            ran_dry = True
            for images, labels in map(_images_and_labels, self._loader):
                if len(images) > 1:
                    ran_dry = False
                    yield images, labels
            if ran_dry:
                raise ImagesError(
                    "the loader yields no batches of two images or more: give one that can be read again and again"
                )

    def examples(self, count: int) -> Tensor:
        images, _ = next(self._batches())
        return images[:count]


class _InOrder:
    """The batches of a source that can only be read in order, any number of times."""

    def __init__(self, source: ImageSource, batch_size: int) -> None:
        self._source = source
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return self._source.batches(self._batch_size)


def _images_and_labels(item: Any) -> tuple[Tensor, Tensor | None]:
    images = batch_of(item)
    others = item[1:] if isinstance(item, (tuple, list)) else ()
    labels = others[0] if others and isinstance(others[0], Tensor) else None
    return images, None if labels is None else identity_labels(labels, len(images))


def _flipped(images: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)


def _augmented(images: Tensor, mates: Tensor, config: DistillConfig, step: int, first: int) -> Tensor:
    if config.augmentation is None or images.dtype != torch.uint8:
        return images
    return augmented(images, mates, config.augmentation, config.seed, step, first)
