"""Batches, flips and random draws as pure functions of the seed and the step.

No state is kept, so a resumed run draws exactly what the interrupted run would have drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor

__all__ = ["PairSampler", "StepIndices", "flips", "seeded_rng"]

StepIndices = tuple[int, list[int]]
"""Step number, and the indices of the images of its batch."""

# 32 random images and 8 identities x 4 images in a batch of 64: Tencent/TFace, recognition/tasks/ekd.
_IMAGES_PER_IDENTITY = 4
_IDENTITIES_PER_IMAGE = 1 / 8

_FLIPS = 1  # separates the random stream of flips from that of batches
_NETWORKS = 2  # separates the random stream of networks from both


class PairSampler:
    """Sampler of batches with positive pairs: half random images, half images of a few identities.

    A batch of 64 holds 4 images each of 8 identities; other sizes scale with it, with at least one identity. An
    identity with fewer images contributes all of them, identities with a single image only appear among the random
    images, and random images fill up the batch. Within an epoch all random images differ, and no batch holds an image
    twice. Without labels all images are random.

    Args:
        num_images: number of images.
        labels: identities, int64 [num_images], or None.
        batch_size: images per batch, at most ``num_images``.
        seed: seed of all draws, >= 0.
    """

    def __init__(self, num_images: int, labels: Tensor | None, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self._groups = [] if labels is None else _groups(labels)
        self._images_per_identity = min(_IMAGES_PER_IDENTITY, max(2, batch_size // 2))
        self._identities = min(max(1, int(batch_size * _IDENTITIES_PER_IMAGE)), len(self._groups))

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.num_images // self.batch_size

    @property
    def has_positives(self) -> bool:
        """True if every batch holds two images of one identity."""
        return self._identities > 0

    def batches(self, steps: range) -> Iterator[StepIndices]:
        """Yield the batches of the consecutive ``steps``."""
        epoch, skipped = divmod(steps.start, self.steps_per_epoch)
        batches = chain.from_iterable(map(self.epoch, count(epoch)))
        yield from zip(steps, islice(batches, skipped, None), strict=False)

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the batches of epoch ``number``, each a list of ``batch_size`` indices."""
        random = np.random.default_rng((self.seed, number))
        images = deque(random.permutation(self.num_images).tolist())
        identities: deque[int] = deque()
        for _ in range(self.steps_per_epoch):
            if len(identities) < self._identities:
                identities = deque(random.permutation(len(self._groups)).tolist())
            chosen = [identities.popleft() for _ in range(self._identities)]
            batch = [index for identity in chosen for index in self._some_of(identity, random)]
            yield batch + _take(images, self.batch_size - len(batch), set(batch))

    def _some_of(self, identity: int, random: np.random.Generator) -> list[int]:
        group = self._groups[identity]
        size = min(self._images_per_identity, len(group))
        return [int(index) for index in random.choice(group, size, replace=False)]


def _groups(labels: Tensor) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return the image indices of each identity with two or more images."""
    values = labels.cpu().numpy()
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    return [group for group in np.split(order, starts) if len(group) > 1]


def _take(images: deque[int], count: int, excluded: set[int]) -> list[int]:
    """Remove and return the first ``count`` images that are not ``excluded``.

    The images always suffice: an epoch has at most ``floor(images / batch_size)`` steps, so at least ``batch_size``
    images remain before the last one.
    """
    taken: list[int] = []
    passed: list[int] = []
    while len(taken) < count:
        index = images.popleft()
        (passed if index in excluded else taken).append(index)
    images.extendleft(reversed(passed))
    return taken


def flips(count: int, seed: int, step: int) -> Tensor:
    """Draw which images of the batch of ``step`` are mirrored, bool [count]."""
    return torch.from_numpy(np.random.default_rng((seed, step, _FLIPS)).random(count) < 0.5)


@contextmanager
def seeded_rng(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators in the block, for dropout or stochastic depth, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng([seed, step, _NETWORKS]).integers(2**63 - 1)))
        yield
