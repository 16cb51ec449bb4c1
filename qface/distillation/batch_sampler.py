"""Batches and mirrored images, as functions of the seed and the step alone.

Nothing here remembers anything, so a run that goes on after a crash draws exactly what it would have drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["PairSampler", "flips", "seeded_rng"]

# 32 random images beside 8 identities x 4 images in a batch of 64: Tencent/TFace, recognition/tasks/ekd.
_IMAGES_PER_IDENTITY = 4
_IDENTITIES_PER_IMAGE = 1 / 8

_FLIPS = 1  # keeps the flips of a step apart from the batches of the epoch of the same number
_NETWORKS = 2  # likewise, and what networks draw apart from both


class PairSampler:
    """Batches that hold enough positive pairs: half random images, half a few images each of some identities.

    A batch of 64 has 8 identities with 4 images each; other sizes in proportion, at least one identity. An
    identity with fewer images gives what it has, one with a single image counts as random, and random images
    fill up the rest: an epoch's random images are all different, and no image is twice in one batch. Without
    labels a batch is random.

    Args:
        count: number of images.
        labels: their identities, int64 [count], or None.
        batch_size: images in a batch, at most ``count``.
        seed: of all draws, from 0 on.
    """

    def __init__(self, count: int, labels: Tensor | None, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._groups = [] if labels is None else _groups(labels)
        self._images_per_identity = min(_IMAGES_PER_IDENTITY, max(2, batch_size // 2))
        self._identities = min(max(1, int(batch_size * _IDENTITIES_PER_IMAGE)), len(self._groups))

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.count // self.batch_size

    @property
    def has_positives(self) -> bool:
        """True if every batch holds two images of one person."""
        return self._identities > 0

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the batches of epoch ``number``, each a list of ``batch_size`` indices."""
        random = np.random.default_rng((self.seed, number))
        images = deque(random.permutation(self.count).tolist())
        identities: deque[int] = deque()
        for _ in range(self.steps):
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
    """The indices of each identity that has two images or more."""
    values = labels.cpu().numpy()
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    return [group for group in np.split(order, starts) if len(group) > 1]


def _take(images: deque[int], count: int, excluded: set[int]) -> list[int]:
    """Remove the first ``count`` of ``images`` that are not ``excluded``; the excluded ones before them stay.

    An epoch never runs dry: it has at most ``floor(images / batch)`` steps, so a whole batch is left at the
    last.
    """
    taken: list[int] = []
    passed: list[int] = []
    while len(taken) < count:
        index = images.popleft()
        (passed if index in excluded else taken).append(index)
    images.extendleft(reversed(passed))
    return taken


def flips(count: int, seed: int, step: int) -> Tensor:
    """Draw which of the ``count`` images of batch ``step`` are mirrored, bool [count]."""
    return torch.from_numpy(np.random.default_rng((seed, step, _FLIPS)).random(count) < 0.5)


@contextmanager
def seeded_rng(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make random draws of networks within, such as dropout and stochastic depth, a function of seed and step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng([seed, step, _NETWORKS]).integers(2**63 - 1)))
        yield
