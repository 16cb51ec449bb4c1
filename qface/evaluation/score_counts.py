"""Scores counted by their bits, from which the score of any rank follows exactly, however many scores there are.

The 32 bits of a float, made to an integer of the same order, are split in two halves, and the upper 16 bits are a bin.
Every score is counted in its bin, and those in watched bins by their lower 16 bits too. So one pass over the scores
finds the bin of each rank, and a pass that watches these bins finds the scores themselves.
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
"""From so many impostor pairs on, a sample tells which bins to watch, so that one pass does."""
_SAMPLE = (4096, 2048)
_MOST_WATCHED = 256  # bins, which take 1 MiB each


@dataclass(frozen=True)
class Watch:
    """The bins and the floor that a pass over the scores looks at.

    Args:
        bins: of which the lower bits are counted too, ascending.
        floor: lower scores are passed over.
    """

    bins: tuple[int, ...] = ()
    floor: float = -np.inf

    @classmethod
    def of(cls, bins: set[int]) -> Watch:
        """Watch ``bins``, and no score below them."""
        # Scores equal to the floor are passed over too; the float before 0 is -0, which equals it.
        return cls(tuple(sorted(bins)), float(_score((min(bins) << 16) - 2)))


def watch_for_sample(scores: PairScores, ranks: list[int], impostors: int) -> Watch:
    """The bins in which the ``ranks`` most likely lie, as far as a sample of the pairs tells; of few pairs, none.

    Args:
        scores: of all pairs.
        ranks: of impostors, in descending order.
        impostors: number of impostor pairs.
    """
    if impostors < _LARGE or not ranks:
        return Watch()
    sample = np.sort(scores.sample(np.random.default_rng(0), *_SAMPLE))[::-1]
    bins: set[int] = set()
    for rank in sorted(ranks, reverse=True):
        nearby = _bins_around(sample, rank / impostors)
        if len(bins | nearby) > _MOST_WATCHED:
            break
        bins |= nearby
    return Watch.of(bins) if bins else Watch()


def _bins_around(sample: Scores, rate: float) -> set[int]:
    """The bins of the score that is exceeded by the share ``rate``, with what the sample leaves open."""
    expected = rate * len(sample)
    spread = 6 * np.sqrt(expected) + 10  # six standard deviations, were the pairs independent
    lowest = _key(sample[min(int(expected + spread), len(sample) - 1)])
    highest = _key(sample[int(expected - spread)] if expected > spread else np.float32(1))
    return set(range(lowest >> 16, (highest >> 16) + 1))


@dataclass(frozen=True)
class RankedScore:
    """An impostor score, and what lies above it.

    Args:
        score: of the rank that was asked for.
        genuine_above: how many genuine scores are larger.
    """

    score: float
    genuine_above: int


@dataclass
class ScoreCounts:
    """Counts of genuine (0) and impostor scores (1).

    Args:
        watch: what is counted.
        upper: int64 [2, 2^16], scores by their bin.
        lower: int64 [2, watched bins, 2^16], scores in these bins by their lower bits.
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
        """The bin of the impostor at which the rates of errors are closest from above; see :meth:`equal_error`.

        Args:
            genuine: number of genuine pairs, those below the floor included.
            impostors: number of impostor pairs, likewise.
        """
        false = np.cumsum(self.upper[1, ::-1]) / impostors
        missed = (genuine - np.cumsum(self.upper[0, ::-1])) / genuine
        return _HALF // 2 - 1 - int(np.argmax(false >= missed))

    def equal_error(self, genuine: int, impostors: int) -> float:
        """The equal error rate: the least of the greater of both rates of errors, over all thresholds.

        Args:
            genuine: number of genuine pairs, those below the floor included.
            impostors: number of impostor pairs, likewise; the watch holds their :meth:`equal_error_bin` alone.
        """
        (cell,) = np.flatnonzero(self._slots >= 0)
        false, accepted = (
            self.upper[kind, cell + 1 :].sum() + np.concatenate([[0], np.cumsum(self.lower[kind, 0, ::-1])])
            for kind in (1, 0)
        )
        return float(np.maximum(false / impostors, (genuine - accepted) / genuine).min())

    def bins_of(self, ranks: list[int]) -> set[int] | None:
        """The bins of impostors of these ranks; None if one is below the watch's floor."""
        found = {self._bin_of(rank) for rank in ranks}
        return None if None in found else {each for each in found if each is not None}

    def _bin_of(self, rank: int) -> int | None:
        place = _place(self.upper[1], rank)
        return None if place is None else place[0] - _HALF // 2

    def ranked(self, ranks: Mapping[str, int]) -> dict[str, RankedScore]:
        """The impostor of each rank in descending order; the watch holds the bins of all."""
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
    """The cell of the ``rank``-th in descending order, and how many are in higher cells; None if there are too few."""
    from_above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_above, rank, side="right"))
    if index == len(counts):
        return None
    cell = len(counts) - 1 - index
    return cell, int(from_above[index] - counts[cell])


def _keys(scores: Scores) -> npt.NDArray[np.int32]:
    """Integers in the order of ``scores``: their bits, which are those of magnitude and sign, made two's complement."""
    bits = np.ascontiguousarray(scores).view(np.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _key(score: np.float32) -> int:
    return int(_keys(np.array([score], np.float32))[0])


def _score(key: int) -> np.float32:
    """The float32 whose key is ``key``."""
    bits = np.array([key], np.int32)
    return np.float32((bits ^ (bits >> 31 & 0x7FFFFFFF)).view(np.float32)[0])
