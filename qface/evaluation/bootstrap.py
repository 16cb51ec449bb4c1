"""Confidence intervals by bootstrap over people: how much a rate would move with other people of the same kind.

Images of one person are alike, so people are resampled, and not images or pairs (Efron and Tibshirani, *An Introduction
to the Bootstrap*, 1993, chapters 8 and 13). In a replicate, person p occurs w_p times. A genuine pair of p then counts
w_p times, and an impostor pair of p and q counts w_p * w_q times. Pairs of two copies of one person count as neither.

No cosine is computed twice: the impostor scores that can become a threshold are kept with their people, and each
replicate weighs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qface.checks import check_seed, check_whole
from qface.errors import ConfigError
from qface.evaluation.pair_scores import Scores
from qface.evaluation.verification import FPRS, count_pairs, ranks_of, tpr_at_fpr

__all__ = ["CONFIDENCE", "REPLICATES", "Interval", "TprDrop", "bootstrap_tpr", "bootstrap_tpr_drop"]

REPLICATES = 200
"""Enough for an interval of 95 % (Efron and Tibshirani, section 13.3, take more for the tails alone)."""
CONFIDENCE = 0.95

_ROWS = 512
"""Rows of the matrix of cosines that are computed at once."""
_MARGIN = 2
"""Kept impostor scores, in parts of those that the rate accepts; replicates that need more keep twice as many."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share, 0..1.

    Args:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class TprDrop:
    """The TPR that one model loses against another, as a share, 0..1; negative where it gains.

    Args:
        drop: TPR of the reference minus that of the model, on the people as they are.
        interval: two-sided confidence interval of the drop.
        upper: one-sided upper bound of the drop at the same confidence.
    """

    drop: float
    interval: Interval
    upper: float


def bootstrap_tpr(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval | None]:
    """Confidence intervals of :func:`qface.evaluation.tpr_at_fpr`, by the percentiles of resampled people.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``; they are the keys of the result.
        replicates: sets of people that are drawn.
        seed: of the draws.
        confidence: of the intervals, above 0 and below 1.

    Returns:
        None for a rate with too few impostor pairs to measure it. Memory grows with the largest rate: 16 bytes for
        each impostor pair that it accepts, twice.

    Raises:
        ConfigError: a setting is out of its range.
        ImagesError: there are no genuine or no impostor pairs.

    Example:
        >>> faces = np.eye(8, dtype=np.float32)[np.repeat(np.arange(8), 2)]
        >>> bootstrap_tpr(faces, np.repeat(np.arange(8), 2), ["0.5"])
        {'0.5': Interval(low=1.0, high=1.0)}
    """
    bootstrap = _Bootstrap(labels, replicates, seed, confidence)
    rates = {fpr: bootstrap.tprs(np.asarray(probes), fpr) for fpr in fprs}
    return {fpr: None if tprs is None else bootstrap.interval(tprs[1:]) for fpr, tprs in rates.items()}


def bootstrap_tpr_drop(
    reference: Scores,
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, TprDrop | None]:
    """The TPR that ``probes`` lose against ``reference``, with its confidence over people.

    Both models meet the same people in each replicate, so that what makes these people easy or hard cancels out. Each
    model has the threshold of its own impostor scores.

    Args:
        reference: float32 [images, dimensions], L2-normalized, of the reference, such as the float network.
        probes: the same images, embedded by the model.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``; they are the keys of the result.
        replicates: sets of people that are drawn.
        seed: of the draws.
        confidence: of interval and bound, above 0 and below 1.

    Returns:
        None for a rate with too few impostor pairs to measure it.

    Raises:
        ConfigError: a setting is out of its range.
        ImagesError: there are no genuine or no impostor pairs.

    Example:
        >>> faces = np.eye(8, dtype=np.float32)[np.repeat(np.arange(8), 2)]
        >>> bootstrap_tpr_drop(faces, faces, np.repeat(np.arange(8), 2), ["0.5"])["0.5"].upper
        0.0
    """
    bootstrap = _Bootstrap(labels, replicates, seed, confidence)
    drops = {}
    for fpr in fprs:
        before, after = (bootstrap.tprs(np.asarray(each), fpr) for each in (reference, probes))
        drops[fpr] = None if before is None or after is None else bootstrap.drop(before - after)
    return drops


class _Bootstrap:
    """Draws of people, and what they make of scores; the first draw is of each person once."""

    def __init__(self, labels: npt.ArrayLike, replicates: int, seed: int, confidence: float) -> None:
        check_whole(1, replicates=replicates)
        check_seed(seed)
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence is {confidence}; it must be a number above 0 and below 1, such as 0.95")
        self._confidence = confidence
        self._labels = np.asarray(labels)
        _, self._people, self._images_of = np.unique(self._labels, return_inverse=True, return_counts=True)
        self._impostors = count_pairs(self._labels)[1]
        people = len(self._images_of)
        drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=replicates)
        self._weights: list[Ints] = [np.ones(people, np.int64), *drawn]

    def interval(self, values: Floats) -> Interval:
        """The percentiles of ``values``, of a replicate each."""
        outside = (1 - self._confidence) / 2
        low, high = np.quantile(values, [outside, 1 - outside])
        return Interval(float(low), float(high))

    def drop(self, values: Floats) -> TprDrop:
        """Of the people as they are, and of the replicates after them."""
        upper = float(np.quantile(values[1:], self._confidence))
        return TprDrop(float(values[0]), self.interval(values[1:]), upper)

    def tprs(self, embeddings: Scores, fpr: str) -> Floats | None:
        """TPR at ``fpr`` for each draw; None where it cannot be measured."""
        if ranks_of([fpr], self._impostors)[fpr] is None:
            return None
        margin = Fraction(_MARGIN)
        while True:
            pairs = self._pairs(embeddings, self._cutoff(embeddings, Fraction(fpr) * margin))
            tprs = [pairs.tpr(weights, self._images_of, Fraction(fpr)) for weights in self._weights]
            if all(tpr is not None for tpr in tprs):
                return np.array(tprs, np.float64)
            margin *= 2

    def _cutoff(self, embeddings: Scores, rate: Fraction) -> float:
        """The score that so many of the impostor pairs exceed; none is cut off from a rate of 1 on."""
        if rate >= 1:
            return float("-inf")
        decimal = f"{float(rate):.9e}"
        threshold = tpr_at_fpr(embeddings, self._labels, [decimal])[decimal].threshold
        assert threshold is not None  # the rate is larger than one that can be measured
        return threshold

    def _pairs(self, embeddings: Scores, cutoff: float) -> _Pairs:
        people = self._people
        scores: list[npt.NDArray[np.float32]] = []
        sides: list[npt.NDArray[np.int32]] = []
        genuine: list[npt.NDArray[np.float32]] = []
        owners: list[npt.NDArray[np.int32]] = []
        columns = np.arange(len(people))
        for start in range(0, len(people), _ROWS):
            stop = min(start + _ROWS, len(people))
            cosines = embeddings[start:stop] @ embeddings[start:].T
            later = columns[start:] > columns[start:stop, None]
            same = people[start:] == people[start:stop, None]
            row, column = np.nonzero(later & same)
            genuine.append(cosines[row, column])
            owners.append(people[start + row].astype(np.int32))
            row, column = np.nonzero(later & ~same & (cosines >= cutoff))
            scores.append(cosines[row, column])
            sides.append(np.stack([people[start + row], people[start + column]]).astype(np.int32))
        return _Pairs(
            *_falling(np.concatenate(scores), np.concatenate(sides, axis=1)),
            *_falling(np.concatenate(genuine), np.concatenate(owners)),
        )


def _falling(
    scores: npt.NDArray[np.float32], people: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], people[..., order]


@dataclass(frozen=True)
class _Pairs:
    """Scores in falling order, with their people.

    Args:
        impostors: float32 [kept], the largest.
        sides: int32 [2, kept], the two people of each.
        genuine: float32 [genuine pairs], all.
        owners: int32 [genuine pairs], the person of each.
    """

    impostors: npt.NDArray[np.float32]
    sides: npt.NDArray[np.int32]
    genuine: npt.NDArray[np.float32]
    owners: npt.NDArray[np.int32]

    def tpr(self, weights: Ints, images_of: Ints, rate: Fraction) -> float | None:
        """TPR where person p occurs ``weights[p]`` times; None where the threshold lies among scores not kept.

        A draw without genuine pairs or with too few people for impostor pairs accepts what its rank leaves: 0.
        """
        images = weights * images_of
        total = (int(images.sum()) ** 2 - int((images**2).sum())) // 2
        counts = np.cumsum(weights[self.sides[0]] * weights[self.sides[1]])
        position = int(np.searchsorted(counts, int(total * rate), side="right"))
        if position == len(counts):
            return None if total else 0.0
        accepted = int(np.searchsorted(-self.genuine, -self.impostors[position], side="left"))
        owned = weights[self.owners]
        return float(owned[:accepted].sum() / max(owned.sum(), 1))
