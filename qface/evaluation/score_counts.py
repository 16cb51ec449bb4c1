"""Histograms of score bits, which give the score of any rank exactly for any number of scores.

The 32 bits of a float are mapped to an integer of the same order. Its upper 16 bits are the bin of the score. Scores in
watched bins are also counted by their lower 16 bits. So one pass over the scores finds the bin of each rank, and a pass
that watches these bins finds the exact scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qface.evaluation.pair_scores import PairScores, Scores

__all__ = ["RankedScore", "ScoreCounts", "Watch", "watch_for_sample"]

_HALF = 1 << 16
_LARGE = 2**25
"""Minimum number of impostor pairs for choosing the watched bins by a sample, so that one pass suffices."""
_SAMPLE = (4096, 2048)
_MAX_WATCHED = 256  # maximum number of watched bins, 1 MiB each


@dataclass(frozen=True)
class Watch:
    """Watched bins and floor of a pass over the scores.

    Args:
        bins: bins whose lower bits are counted too, ascending.
        floor: exclusive minimum of the scores that are counted.
    """

    bins: tuple[int, ...] = ()
    floor: float = -np.inf

    @classmethod
    def of(cls, bins: set[int]) -> Watch:
        """Watch ``bins`` and ignore scores below them."""
        # Minus 2, because scores equal to the floor are ignored too, and the float before 0 is -0, which equals 0.
        return cls(tuple(sorted(bins)), float(_score((min(bins) << 16) - 2)))


def watch_for_sample(scores: PairScores, ranks: list[int], impostors: int) -> Watch:
    """Estimate the bins of the ranked scores from a sample of the pairs.

    Args:
        scores: scores of all pairs.
        ranks: ranks of impostor scores in descending order.
        impostors: number of impostor pairs; with few, no bins are watched.
    """
    if impostors < _LARGE or not ranks:
        return Watch()
    sample = np.sort(scores.sample(np.random.default_rng(0), *_SAMPLE))[::-1]
    bins: set[int] = set()
    for rank in sorted(ranks, reverse=True):
        nearby = _bins_around(sample, rank / impostors)
        if len(bins | nearby) > _MAX_WATCHED:
            break
        bins |= nearby
    return Watch.of(bins) if bins else Watch()


def _bins_around(sample: Scores, rate: float) -> set[int]:
    """Return the likely bins of the score that the fraction ``rate`` of all scores exceeds."""
    expected = rate * len(sample)
    spread = 6 * np.sqrt(expected) + 10  # six standard deviations of independent pairs
    lowest = _key(sample[min(int(expected + spread), len(sample) - 1)])
    highest = _key(sample[int(expected - spread)] if expected > spread else np.float32(1))
    return set(range(lowest >> 16, (highest >> 16) + 1))


@dataclass(frozen=True)
class RankedScore:
    """Impostor score of a given rank.

    Args:
        score: the score.
        genuine_above: number of larger genuine scores.
    """

    score: float
    genuine_above: int


@dataclass
class ScoreCounts:
    """Counts of genuine (index 0) and impostor scores (index 1).

    Args:
        watch: watched bins and floor.
        upper: int64 [2, 2^16], counts by bin.
        lower: int64 [2, watched bins, 2^16], counts in these bins by lower bits.
    """

    watch: Watch
    upper: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, _HALF), np.int64))
    lower: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.lower = np.zeros((2, len(self.watch.bins), _HALF), np.int64)
        self._slots = np.full(_HALF, -1, np.int32)
        self._slots[[each + _HALF // 2 for each in self.watch.bins]] = range(len(self.watch.bins))

    def add(self, *kinds: Scores) -> None:
        """Count genuine and impostor scores, float32 [any] each."""
        for kind, scores in enumerate(kinds):
            keys = _keys(scores)
            bins = (keys >> 16) + _HALF // 2
            self.upper[kind] += np.bincount(bins, minlength=_HALF)
            slots = self._slots[bins]
            watched = slots >= 0
            np.add.at(self.lower[kind], (slots[watched], keys[watched] & (_HALF - 1)), 1)

    def equal_error_bin(self, genuine: int, impostors: int) -> int:
        """Return the highest bin at whose lower end the false match rate reaches the false non-match rate.

        Args:
            genuine: number of genuine pairs, including those below the floor.
            impostors: number of impostor pairs, likewise.
        """
        false = np.cumsum(self.upper[1, ::-1]) / impostors
        missed = (genuine - np.cumsum(self.upper[0, ::-1])) / genuine
        return _HALF // 2 - 1 - int(np.argmax(false >= missed))

    def equal_error(self, genuine: int, impostors: int) -> float:
        """Compute the equal error rate: the minimum over thresholds of the maximum of both error rates.

        The only watched bin must be :meth:`equal_error_bin`.

        Args:
            genuine: number of genuine pairs, including those below the floor.
            impostors: number of impostor pairs, likewise.
        """
        (cell,) = np.flatnonzero(self._slots >= 0)
        false, accepted = (
            self.upper[kind, cell + 1 :].sum() + np.concatenate([[0], np.cumsum(self.lower[kind, 0, ::-1])])
            for kind in (1, 0)
        )
        return float(np.maximum(false / impostors, (genuine - accepted) / genuine).min())

    def bins_of(self, ranks: list[int]) -> set[int] | None:
        """Return the bins of the impostor scores of these ranks; None if one is below the floor."""
        found = {self._bin_of(rank) for rank in ranks}
        return None if None in found else {each for each in found if each is not None}

    def _bin_of(self, rank: int) -> int | None:
        place = _place(self.upper[1], rank)
        return None if place is None else place[0] - _HALF // 2

    def ranked(self, ranks: Mapping[str, int]) -> dict[str, RankedScore]:
        """Return the impostor score of each rank in descending order; all their bins must be watched."""
        return {name: self._ranked(rank) for name, rank in ranks.items()}

    def _ranked(self, rank: int) -> RankedScore:
        upper = _place(self.upper[1], rank)
        assert upper is not None
        slot = self._slots[upper[0]]
        lower = _place(self.lower[1, slot], rank - upper[1])
        assert lower is not None
        genuine = self.upper[0, upper[0] + 1 :].sum() + self.lower[0, slot, lower[0] + 1 :].sum()
        return RankedScore(float(_score(((upper[0] - _HALF // 2) << 16) + lower[0])), int(genuine))


def _place(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int] | None:
    """Return the cell of the ``rank``-th highest score and the count above it; None if there are too few."""
    from_above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_above, rank, side="right"))
    if index == len(counts):
        return None
    cell = len(counts) - 1 - index
    return cell, int(from_above[index] - counts[cell])


def _keys(scores: Scores) -> npt.NDArray[np.int32]:
    """Map scores to integers of the same order: sign-magnitude bits become two's complement."""
    bits = np.ascontiguousarray(scores).view(np.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _key(score: np.float32) -> int:
    return int(_keys(np.array([score], np.float32))[0])


def _score(key: int) -> np.float32:
    """Return the float32 with this key."""
    bits = np.array([key], np.int32)
    return np.float32((bits ^ (bits >> 31 & 0x7FFFFFFF)).view(np.float32)[0])
