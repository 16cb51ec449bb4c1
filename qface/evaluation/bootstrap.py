"""Confidence intervals of verification figures, by bootstrap over people.

Pairs that share a person are not independent, so people are resampled, and neither images nor pairs: this is the vertex
bootstrap (Snijders and Borgatti, "Non-parametric standard errors and tests for network statistics", 1999). In a
replicate, person i is drawn w_i times; a genuine pair of i counts w_i times and an impostor pair of i and j
w_i * w_j times. Two copies of one person form no pairs.

Cosines are computed once: the highest impostor scores and all genuine scores are kept with their people, and each
replicate weighs them. A threshold is then a weighted rank, and exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from qface.checks import check_seed, check_whole
from qface.errors import ConfigError, PairsError
from qface.evaluation.pair_scores import OwnedScores, PairScores, Scores
from qface.evaluation.score_ranking import ranked_scores
from qface.evaluation.verification import FPRS, count_pairs, ranks_of, single_fold_accuracy, ten_fold_accuracy
from qface.parallel import SingleProcess

__all__ = [
    "CONFIDENCE",
    "REPLICATES",
    "Draws",
    "Interval",
    "PairIntervals",
    "TprDrop",
    "WeighedPairs",
    "bootstrap_pairs",
    "bootstrap_tpr",
    "bootstrap_tpr_drop",
    "descending",
    "each_draw",
    "images_of",
]

REPLICATES = 200
CONFIDENCE = 0.95

_MOST_KEPT = 15_000_000
"""Impostor scores kept, which take 0.6 GB while they are sorted: enough for a rate of 1e-1 of 100 million pairs."""
_BLOCK = 2**15  # scores weighed at a time, so that temporaries stay in the cache

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
    """The TPR that a model loses against a reference, as a share; negative where it gains.

    Args:
        drop: TPR of the reference minus TPR of the model, on the people as they are.
        interval: two-sided confidence interval of the drop.
        upper: one-sided upper bound of the drop, at the same confidence.
    """

    drop: float
    interval: Interval
    upper: float


@dataclass(frozen=True)
class PairIntervals:
    """Confidence intervals of figures over listed pairs.

    Args:
        accuracy: of the accuracy over folds.
        tpr_at_fpr: of the true-positive rate at each false-positive rate; None where it is not measured.
    """

    accuracy: Interval | None
    tpr_at_fpr: dict[str, Interval | None]


def bootstrap_tpr(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    gallery: Scores | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval | None]:
    """Confidence intervals of :func:`qface.evaluation.tpr_at_fpr` over all pairs of images.

    The ends are percentiles over the replicates, save those without genuine or impostor pairs. Under ``torchrun`` every
    process computes the same.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``; they are the keys of the result.
        gallery: the same images embedded by another model; see :func:`qface.evaluation.tpr_at_fpr`.
        replicates: how often people are drawn.
        seed: of the draws.
        confidence: of the intervals, between 0 and 1.

    Returns:
        None for a rate that accepts fewer than 10 impostors, and for one that accepts more than about 10 million:
        their scores are not kept, and the interval of so large a rate is narrow.

    Raises:
        ConfigError: a setting is out of its range.
        ImagesError: there are no genuine or no impostor pairs.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> faces = np.eye(8, dtype=np.float32)[np.repeat(np.arange(8), 2)]
        >>> bootstrap_tpr(faces, np.repeat(np.arange(8), 2), ["0.5"])
        {'0.5': Interval(low=1.0, high=1.0)}
    """
    draws = Draws(len(images_of(labels)), replicates, seed, confidence)
    tprs = each_draw(probes, labels, fprs, gallery, draws, WeighedPairs.tprs)
    return {fpr: None if values is None else draws.interval(values) for fpr, values in tprs.items()}


def bootstrap_tpr_drop(
    reference: Scores,
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    gallery: Scores | None = None,
    reference_gallery: Scores | None = None,
) -> dict[str, TprDrop | None]:
    """The TPR that ``probes`` lose against ``reference``, with its confidence over people.

    Both models meet the same people in each replicate, so that hard people cancel out. Each model has the threshold of
    its own impostor scores.

    Args:
        reference: float32 [images, dimensions], L2-normalized, of the reference, such as the float network.
        probes: the same images embedded by the model.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``; they are the keys of the result.
        replicates: how often people are drawn.
        seed: of the draws.
        confidence: of interval and bound, between 0 and 1.
        gallery: what ``probes`` are compared with in place of themselves, such as the reference's embeddings.
        reference_gallery: likewise of ``reference``.

    Returns:
        None for a rate that :func:`bootstrap_tpr` does not measure.

    Raises:
        ConfigError: a setting is out of its range.
        ImagesError: there are no genuine or no impostor pairs.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> faces = np.eye(8, dtype=np.float32)[np.repeat(np.arange(8), 2)]
        >>> bootstrap_tpr_drop(faces, faces, np.repeat(np.arange(8), 2), ["0.5"])["0.5"].upper
        0.0
    """
    draws = Draws(len(images_of(labels)), replicates, seed, confidence)
    before = each_draw(reference, labels, fprs, reference_gallery, draws, WeighedPairs.tprs)
    after = each_draw(probes, labels, fprs, gallery, draws, WeighedPairs.tprs)
    return {fpr: _drop(before[fpr], after[fpr], draws) for fpr in fprs}


def _drop(before: Floats | None, after: Floats | None, draws: Draws) -> TprDrop | None:
    if before is None or after is None:
        return None
    drops = before - after
    interval = draws.interval(drops)
    if interval is None:
        return None
    return TprDrop(float(drops[0]), interval, float(np.nanquantile(drops[1:], draws.confidence)))


def bootstrap_pairs(
    scores: npt.ArrayLike,
    same: npt.ArrayLike,
    fold: npt.ArrayLike,
    people: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    fprs: Sequence[str] = FPRS,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> PairIntervals:
    """Confidence intervals of the accuracy over folds and of TPR at FPR over listed pairs.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], whether both sides show one person.
        fold: int [pairs].
        people: the identities of the first and of the second sides, [pairs] each; people are then resampled. Without
            them pairs are, which takes them for independent: intervals are then too narrow.
        fprs: rates as decimals; they are the keys of the result.
        replicates: how often people or pairs are drawn.
        seed: of the draws.
        confidence: of the intervals, between 0 and 1.

    Raises:
        ConfigError: a setting is out of its range.

    Example:
        >>> same = np.tile([True, False], 40)
        >>> bootstrap_pairs(np.where(same, 0.9, 0.1), same, np.repeat(range(4), 20)).accuracy
        Interval(low=1.0, high=1.0)
    """
    cosines, genuine = np.asarray(scores, np.float32), np.asarray(same, np.bool_)
    first, second, units, fixed = _units(len(cosines), people)
    draws = Draws(units, replicates, seed, confidence, fixed)

    def counts(weights: Ints) -> Ints:
        return weights[first] * np.where(genuine, 1, weights[second])

    of_one, of_two = (
        descending([OwnedScores(cosines[kind], first[kind], second[kind])]) for kind in (genuine, ~genuine)
    )
    pairs = WeighedPairs(of_one, of_two, lambda weights: int(counts(weights)[~genuine].sum()))
    ranks = ranks_of(fprs, int(np.count_nonzero(~genuine)))
    measured = [fpr for fpr, rank in ranks.items() if rank is not None]
    table = draws.each(functools.partial(pairs.tprs, fprs=measured))
    tprs = {fpr: draws.interval(table[:, at]) for at, fpr in enumerate(measured)}
    accuracies = draws.each(lambda weights: _accuracy(cosines, genuine, np.asarray(fold), counts(weights)))
    return PairIntervals(draws.interval(accuracies), {fpr: tprs.get(fpr) for fpr in fprs})


def _accuracy(scores: Scores, same: npt.NDArray[np.bool_], fold: npt.NDArray[np.int64], counts: Ints) -> float:
    try:
        if len(np.unique(fold)) == 1:
            return single_fold_accuracy(scores, same, counts)
        return ten_fold_accuracy(scores, same, fold, counts)[0]
    except PairsError:  # nobody was drawn of whom folds need pairs
        return float("nan")


def _units(pairs: int, people: tuple[npt.ArrayLike, npt.ArrayLike] | None) -> tuple[Ints, Ints, int, int]:
    """Numbers of what is drawn, for both sides of each pair; how many these are, and how many more count once.

    Where people are unknown, the first side stands for the pair, and the second for one that is always there once.
    """
    if people is None:
        return np.arange(pairs), np.full(pairs, pairs), pairs, 1
    names, numbers = np.unique(np.concatenate([np.asarray(side) for side in people]), return_inverse=True)
    numbers = numbers.reshape(-1).astype(np.int64)
    return numbers[:pairs], numbers[pairs:], len(names), 0


class Draws:
    """Random draws of people: how often each of ``units`` people counts in each replicate.

    Args:
        units: people.
        replicates: how often they are drawn.
        seed: of the draws.
        confidence: of intervals.
        fixed: more units after them, that count once in every draw.
    """

    def __init__(self, units: int, replicates: int, seed: int, confidence: float, fixed: int = 0) -> None:
        check_whole(1, replicates=replicates)
        check_seed(seed)
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be a number above 0 and below 1, such as 0.95, not {confidence}")
        self.confidence = confidence
        self._units, self._replicates, self._seed, self._fixed = units, replicates, seed, fixed

    def each(self, measure: Callable[[Ints], Floats | float]) -> Floats:
        """``measure`` of the weights where everybody counts once, and then of those of each replicate."""
        rng = np.random.default_rng(self._seed)
        shares = np.full(self._units, 1 / self._units)
        found = [measure(np.ones(self._units + self._fixed, np.int64))]
        for _ in range(self._replicates):
            drawn = rng.multinomial(self._units, shares)
            found.append(measure(np.concatenate([drawn, np.ones(self._fixed, np.int64)])))
        return np.array(found, np.float64)

    def interval(self, values: Floats) -> Interval | None:
        """The percentiles of what :meth:`each` found in the replicates; None where it could measure none."""
        replicates = values[1:][~np.isnan(values[1:])]
        if not len(replicates):
            return None
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(replicates, [outside, 1 - outside])
        return Interval(float(low), float(high))


def images_of(labels: npt.ArrayLike) -> Ints:
    """Number of images of each person, [people], in the order of labels."""
    return np.unique(np.asarray(labels), return_counts=True)[1].astype(np.int64)


def each_draw(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str],
    gallery: Scores | None,
    draws: Draws,
    measure: Callable[..., Floats],
) -> dict[str, Floats | None]:
    """``measure`` of each draw, at the threshold that the draw has for each of ``fprs``.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        fprs: rates as decimals; they are the keys of the result.
        gallery: the same images embedded by another model; see :func:`qface.evaluation.tpr_at_fpr`.
        draws: of the people.
        measure: figures [rates, ...] of :class:`WeighedPairs`, weights of people and ``fprs``; infinite where the
            threshold is below the impostors that are kept.

    Returns:
        Figures [1 + replicates, ...], first those of the people as they are; None where too few or too many impostors
        are accepted.
    """
    scores, images = PairScores(probes, labels, gallery), images_of(labels)
    impostors = count_pairs(labels, scores.ordered)[1]
    ranks = {fpr: rank for fpr, rank in ranks_of(fprs, impostors).items() if rank is not None}
    wanted = [fpr for fpr, rank in ranks.items() if _with_margin(rank) <= _MOST_KEPT]
    most = min(impostors, _MOST_KEPT)
    kept = min(most, _with_margin(max((ranks[fpr] for fpr in wanted), default=0)))
    found: dict[str, Floats | None] = dict.fromkeys(fprs)
    while wanted:
        pairs = _kept_pairs(scores, kept, impostors, images)
        table = draws.each(functools.partial(measure, pairs, fprs=wanted))
        suffices = [not np.isinf(table[:, at]).any() for at in range(len(wanted))]
        found |= {fpr: table[:, at] for at, fpr in enumerate(wanted) if suffices[at]}
        wanted = [fpr for at, fpr in enumerate(wanted) if not suffices[at] and kept < most]
        kept = min(2 * kept, most)
    return found


def _with_margin(rank: int) -> int:
    """Scores to keep for ``rank``: replicates shift it by some ten percent."""
    return rank + rank // 2 + 1000


def _kept_pairs(scores: PairScores, kept: int, impostors: int, images: Ints) -> WeighedPairs:
    """All genuine scores, and the ``kept`` highest impostor scores, save those that equal the next one."""
    floor = float("-inf")
    if kept < impostors:
        floor = ranked_scores(scores, {"kept": kept}, impostors, SingleProcess(torch.device("cpu")))["kept"].score
    genuine, highest = zip(*(scores.with_people(tile, floor) for tile in scores.tiles()), strict=True)

    def total(weights: Ints) -> int:
        drawn = weights * images
        ordered = int(drawn.sum()) ** 2 - int((drawn**2).sum())
        return ordered if scores.ordered else ordered // 2

    return WeighedPairs(descending(genuine), descending(highest), total)


def descending(parts: Sequence[OwnedScores]) -> OwnedScores:
    """The scores of all ``parts`` as one, from high to low."""
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores)
    first, second = (np.concatenate([getattr(part, side) for part in parts]) for side in ("first", "second"))
    return OwnedScores(scores[order], first[order], second[order])


@dataclass(frozen=True)
class WeighedPairs:
    """Scores in descending order, to be weighed.

    Args:
        genuine: all of them.
        impostors: the highest.
        total: the weight of all impostor pairs, of the weights of people.
    """

    genuine: OwnedScores
    impostors: OwnedScores
    total: Callable[[Ints], int]

    def tprs(self, weights: Ints, fprs: Sequence[str]) -> Floats:
        """The true-positive rate at each of ``fprs``.

        It is infinite where the threshold is below the impostors that are kept, and not a number without pairs.
        """
        owned = np.concatenate([[0], np.cumsum(weights[self.genuine.first])])
        if not owned[-1] or not self.total(weights):
            return np.full(len(fprs), np.nan)
        thresholds = self.thresholds_at(weights, fprs)
        accepted = np.searchsorted(-self.genuine.scores, -thresholds, side="left")
        return np.where(np.isinf(thresholds), np.inf, owned[accepted] / owned[-1])

    def thresholds_at(self, weights: Ints, fprs: Sequence[str]) -> Scores:
        """The impostor scores of weighted ranks, one for each of ``fprs``; minus infinity below those that are kept."""
        total = self.total(weights)
        ranks = np.array([int(total * Fraction(fpr)) for fpr in fprs], np.int64)
        found = np.full(len(ranks), -np.inf, np.float32)
        above, last = 0, ranks.max(initial=0)
        for start in range(0, len(self.impostors.scores), _BLOCK):
            part = slice(start, start + _BLOCK)
            weighed = weights[self.impostors.first[part]] * weights[self.impostors.second[part]]
            reached = above + np.cumsum(weighed)
            here = (above <= ranks) & (ranks < reached[-1])
            found[here] = self.impostors.scores[start + np.searchsorted(reached, ranks[here], side="right")]
            above = int(reached[-1])
            if above > last:
                break
        return found
