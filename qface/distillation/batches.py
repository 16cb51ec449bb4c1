"""Training batches by step number, from images that can be read in any order or from a loader."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qface.data.augmentation import augmented
from qface.data.images import (
    ImageSource,
    IndexedImages,
    LoaderImages,
    TensorImages,
    batch_of,
    identity_labels,
    length_of,
)
from qface.data.relabeled import Relabeled
from qface.data.sample import evenly
from qface.data.subset import Subset
from qface.distillation.batch_sampler import PairSampler, StepIndices, flips
from qface.distillation.distill_config import MIN_STEPS, DistillConfig
from qface.errors import ConfigError, ImagesError, QFaceError
from qface.parallel import Parallel

__all__ = ["Batch", "Batches", "batches_of", "with_length"]

_MAX_WORKERS = 4  # one worker decodes 1,200 LFW crops per second (12.6 ms per batch of 16)


class Batch(NamedTuple):
    """Images and labels of one process in one step."""

    images: Tensor
    """This process's share of the batch, uint8 or float [batch_size / processes, 3, H, W]."""

    labels: Tensor | None
    """Identities of the batch over all processes, int64 [batch_size], or None if unknown."""


class Batches(ABC):
    """Training batches as a function of the step number."""

    steps_per_epoch: int | None
    """None if unknown."""

    num_identities: int | None = None
    """Number of identities, or None if unknown."""

    lacks_positives: bool = False
    """True if it is known that no two images show one identity."""

    @abstractmethod
    def stream(self, steps: range) -> Iterator[Batch]:
        """Yield the batches of the consecutive ``steps``."""

    @abstractmethod
    def examples(self, count: int) -> Tensor:
        """Return up to ``count`` images [N, 3, H, W], the same in each process."""


def batches_of(source: ImageSource, config: DistillConfig, parallel: Parallel) -> Batches:
    """Return the training batches of ``source``.

    Args:
        source: the training images.
        config: settings of the distillation.
        parallel: the processes that share each batch.

    Raises:
        ConfigError: several processes cannot share the images or the batch size.
        ImagesError: there are too few images, or a loader can be iterated only once.
    """
    if isinstance(source, IndexedImages):
        return _IndexedBatches(source, config, parallel)
    if parallel.world_size > 1:
        raise ConfigError("several processes need images that can be read in any order: pass a folder or a tensor")
    loader = source.loader if isinstance(source, LoaderImages) else _InOrder(source, config.batch_size)
    return _LoaderBatches(loader, config)


def with_length(config: DistillConfig, source: ImageSource) -> DistillConfig:
    """Return ``config`` with a number of epochs: one, or where that is less than ``MIN_STEPS`` steps, as many steps.

    Args:
        config: settings of the distillation; returned as they are if they have a number of epochs.
        source: the training images.
    """
    if config.epochs is not None:
        return config
    if isinstance(source, IndexedImages):
        steps: int | None = max(1, len(source) // config.batch_size)
    else:
        steps = length_of(source.loader) if isinstance(source, LoaderImages) else None
    if not steps or steps >= MIN_STEPS:
        return replace(config, epochs=1)
    most = MIN_STEPS if config.max_steps is None else min(MIN_STEPS, config.max_steps)
    return replace(config, epochs=math.ceil(MIN_STEPS / steps), max_steps=most)


class _IndexedBatches(Batches):
    """Batches of :class:`PairSampler`; a DataLoader reads the slice of this process."""

    def __init__(self, source: IndexedImages, config: DistillConfig, parallel: Parallel) -> None:
        size = _batch_size(len(source), config.batch_size, parallel.world_size)
        self._source = source
        self._sampler = PairSampler(len(source), source.labels if config.losses.uses_ekd else None, size, config.seed)
        share = size // parallel.world_size
        own = range(parallel.rank * share, (parallel.rank + 1) * share)
        self._dataset = _StepDataset(source, config, own)
        self._num_workers = _num_workers(source, config, parallel)
        self.steps_per_epoch = self._sampler.steps_per_epoch
        self.lacks_positives = not self._sampler.has_positives
        self.num_identities = None if source.labels is None else int(source.labels.max()) + 1

    def stream(self, steps: range) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._sampler.batches(steps),
            num_workers=self._num_workers,
            worker_init_fn=_end_without_failure,
            multiprocessing_context="fork" if self._num_workers else None,
            generator=torch.Generator(),  # the DataLoader draws from it, and should not from the global one
        )
        for batch in loader:
            if isinstance(batch, QFaceError):
                raise batch
            yield batch

    def examples(self, count: int) -> Tensor:
        return self._source.read(evenly(len(self._source), count).tolist())


class _StepDataset(Dataset[Batch | QFaceError]):
    """Dataset of batches: maps a step and its image indices to the flipped and augmented images.

    Only the positions ``own`` of each batch are read, which are the slice of this process.
    """

    def __init__(self, source: IndexedImages, config: DistillConfig, own: range) -> None:
        self._source = source
        self._config = config
        self._own = own

    def __getitem__(self, item: StepIndices) -> Batch | QFaceError:
        """Return errors instead of raising them, since a worker's exceptions arrive as pages of traceback."""
        try:
            return self._read(*item)
        except QFaceError as error:
            return error

    def _read(self, step: int, indices: list[int]) -> Batch:
        # Augmentation mixes an image with the next one of the batch, so the last one needs one more image.
        extra = int(self._config.augmentation is not None)
        places = [place % len(indices) for place in range(self._own.start, self._own.stop + extra)]
        images = self._source.read([indices[place] for place in places])
        if self._config.horizontal_flip:
            images = _flipped(images, flips(len(indices), self._config.seed, step)[places])
        if extra:
            images = _augmented(images[:-1], images[1:], self._config, step, self._own.start)
        labels = self._source.labels
        return Batch(images, None if labels is None else labels[torch.tensor(indices, device=labels.device)])


def _batch_size(images: int, wanted: int, processes: int) -> int:
    if wanted % processes:
        raise ConfigError(f"batch_size must be a multiple of the {processes} processes, got {wanted}")
    size = min(wanted, images - images % processes)
    if size < 2:
        raise ImagesError(f"distillation compares pairs, and {images} images are too few for that: pass more images")
    return size


def _num_workers(source: IndexedImages, config: DistillConfig, parallel: Parallel) -> int:
    """Return the number of workers: as configured, one per free core, or 0 if they cannot be used."""
    # Workers gain nothing for images in memory, and a forked process cannot use CUDA tensors. Without fork, each worker
    # would import the user's script again.
    if _is_in_memory(source) or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    if config.num_workers is not None:
        return config.num_workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    busy = 1 if parallel.device.type == "cuda" else torch.get_num_threads()
    return min(max(len(os.sched_getaffinity(0)) // processes - busy, 0), _MAX_WORKERS)


def _is_in_memory(source: IndexedImages) -> bool:
    while isinstance(source, (Relabeled, Subset)):
        source = source.source
    return isinstance(source, TensorImages)


def _end_without_failure(_: int) -> None:
    """Let SIGTERM, which schedulers send to all processes, end a worker without the status of a failure.

    A failure would raise RuntimeError in the training process, before it has finished and saved its step.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


class _LoaderBatches(Batches):
    """Batches of a loader in its own order, over and over.

    Batches of one image, such as a last incomplete one, are skipped: they have no pairs and no batch statistics.
    """

    def __init__(self, loader: Iterable[Any], config: DistillConfig) -> None:
        if iter(loader) is loader:
            raise ImagesError("a generator can be iterated only in one pass: pass a DataLoader or a list of batches")
        self._loader = loader
        self._config = config
        self.steps_per_epoch = length_of(loader)

    def stream(self, steps: range) -> Iterator[Batch]:
        for step, (images, labels) in zip(steps, islice(self._batches(), steps.start, None), strict=False):
            if self._config.horizontal_flip:
                images = _flipped(images, flips(len(images), self._config.seed, step))
            yield Batch(_augmented(images, images.roll(-1, 0), self._config, step, 0), labels)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        while True:
            is_empty = True
            for images, labels in map(_images_and_labels, self._loader):
                if len(images) > 1:
                    is_empty = False
                    yield images, labels
            if is_empty:
                raise ImagesError(
                    "the loader yields no batches of two images or more: pass one that can be iterated repeatedly"
                )

    def examples(self, count: int) -> Tensor:
        images, _ = next(self._batches())
        return images[:count]


class _InOrder:
    """Iterable over the batches of a source that can only be read in order."""

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
    with _one_thread():
        return augmented(images, mates, config.augmentation, config.seed, step, first)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread like a DataLoader worker: the number of threads affects rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
