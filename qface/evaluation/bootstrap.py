"""Confidence intervals of verification metrics by bootstrap over identities.

Pairs with a common identity are not independent, so identities are resampled, not images or pairs: the vertex bootstrap
(Snijders and Borgatti, "Non-parametric standard errors and tests for network statistics", 1999). If a replicate draws
identity i w_i times, its genuine pairs have weight w_i, and impostor pairs of i and j have weight w_i * w_j. Copies of
one identity form no pairs.

Cosines are computed once. All genuine scores and the highest impostor scores are kept with their identities, and each
replicate weights them. Its thresholds are exact weighted ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

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
    "Floats",
    "Interval",
    "PairIntervals",
    "TprDrop",
    "WeighedPairs",
    "bootstrap_eer",
    "bootstrap_pairs",
    "bootstrap_tpr",
    "bootstrap_tpr_drop",
    "bootstrap_tpr_of_scores",
    "descending",
    "each_draw",
    "images_of",
]

REPLICATES = 200
CONFIDENCE = 0.95

_MAX_KEPT = 15_000_000
"""Maximum number of impostor scores kept; sorting takes 0.6 GB. Enough for an FPR of 1e-1 of 100 million pairs."""
_BLOCK = 2**15  # scores weighted at a time, so that temporaries stay in the cache

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Confidence interval of a rate or of a difference of rates.

    Args:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class TprDrop:
    """TPR of a reference minus TPR of a model, as a fraction.

    Args:
        drop: difference on the original identities; negative if the model is better.
        interval: two-sided confidence interval of the drop.
        upper: one-sided upper confidence bound of the drop, at the same level.
    """

    drop: float
    interval: Interval
    upper: float


@dataclass(frozen=True)
class PairIntervals:
    """Confidence intervals of metrics over listed pairs.

    Args:
        accuracy: interval of the accuracy over folds; None if no replicate has enough pairs.
        eer: interval of the equal error rate, likewise.
        tpr_at_fpr: interval of the true-positive rate at each false-positive rate; None if it is not measured.
    """

    accuracy: Interval | None
    eer: Interval | None
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
    """Compute confidence intervals of :func:`qface.evaluation.tpr_at_fpr` over all pairs of images.

    The ends are percentiles over the replicates with genuine and impostor pairs. Under ``torchrun`` every process
    computes the same.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        fprs: rates as decimals, such as ``"1e-4"``; the keys of the result.
        gallery: embeddings of the same images by another model; see :func:`qface.evaluation.tpr_at_fpr`.
        replicates: number of bootstrap replicates.
        seed: random seed.
        confidence: level of the intervals, between 0 and 1.

    Returns:
        Interval by rate. None for rates that accept fewer than 10 impostors, or more than about 10 million: their
        scores are not kept, and at such large rates the interval is narrow anyway.

    Raises:
        ConfigError: a setting is out of range.
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


def bootstrap_eer(
    eer: float,
    probes: Scores,
    labels: npt.ArrayLike,
    gallery: Scores | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Compute the confidence interval of :func:`qface.evaluation.equal_error_rate` over all pairs of images.

    Args:
        eer: equal error rate of these pairs, 0..1; determines the number of scores to keep.
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        gallery: embeddings of the same images by another model; see :func:`qface.evaluation.tpr_at_fpr`.
        replicates: number of bootstrap replicates.
        seed: random seed.
        confidence: level of the interval, between 0 and 1.

    Returns:
        The interval; None if more than about 10 million impostors are accepted, since their scores are not kept.

    Raises:
        ConfigError: a setting is out of range.
        ImagesError: there are no genuine or no impostor pairs.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> faces = np.eye(8, dtype=np.float32)[np.repeat(np.arange(8), 2)]
        >>> bootstrap_eer(0.0, faces, np.repeat(np.arange(8), 2))
        Interval(low=0.0, high=0.0)
    """
    draws = Draws(len(images_of(labels)), replicates, seed, confidence)
    scores = PairScores(probes, labels, gallery)
    ranks = {"eer": int(eer * count_pairs(labels, scores.ordered)[1])}
    values = _each_draw_at_ranks(scores, labels, ranks, draws, _equal_errors)["eer"]
    return None if values is None else draws.interval(values)


def _equal_errors(pairs: WeighedPairs, weights: Ints, fprs: Sequence[str]) -> Floats:
    return np.full(len(fprs), pairs.equal_error(weights))


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
    """Compute the TPR drop of ``probes`` from ``reference`` with confidence bounds over identities.

    Each replicate has the same identities for both models, so that the effect of hard identities cancels. Each model
    has its own threshold.

    Args:
        reference: embeddings by the reference, such as the float network, float32 [images, dimensions], L2-normalized.
        probes: embeddings of the same images by the model, likewise.
        labels: [images], identity labels.
        fprs: rates as decimals, such as ``"1e-4"``; the keys of the result.
        replicates: number of bootstrap replicates.
        seed: random seed.
        confidence: level of interval and bound, between 0 and 1.
        gallery: embeddings to compare ``probes`` with, such as those of the reference. None: ``probes``.
        reference_gallery: embeddings to compare ``reference`` with. None: ``reference``.

    Returns:
        Drop by rate; None for rates that :func:`bootstrap_tpr` does not measure.

    Raises:
        ConfigError: a setting is out of range.
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
    """Compute confidence intervals of the accuracy over folds and of TPR at FPR over listed pairs.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], True for genuine pairs.
        fold: int [pairs], fold of each pair.
        people: identities of the first and of the second images, [pairs] each, to be resampled. None: pairs are
            resampled as if they were independent, and intervals are too narrow.
        fprs: rates as decimals; the keys of the result.
        replicates: number of bootstrap replicates.
        seed: random seed.
        confidence: level of the intervals, between 0 and 1.

    Raises:
        ConfigError: a setting is out of range.

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

    pairs = _listed_pairs(cosines, genuine, first, second)
    accuracies = draws.each(lambda weights: _accuracy(cosines, genuine, np.asarray(fold), counts(weights)))
    return PairIntervals(
        accuracy=draws.interval(accuracies),
        eer=draws.interval(draws.each(pairs.equal_error)),
        tpr_at_fpr=_tpr_intervals(pairs, draws, fprs),
    )


def bootstrap_tpr_of_scores(
    scores: npt.ArrayLike,
    same: npt.ArrayLike,
    people: tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]],
    fprs: Sequence[str] = FPRS,
    replicates: int = REPLICATES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval | None]:
    """Compute confidence intervals of :func:`qface.evaluation.tpr_at_fpr_of_scores` over listed pairs.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], True for genuine pairs.
        people: identities of both sides of each pair, int [pairs] each, numbered from 0.
        fprs: rates as decimals; the keys of the result.
        replicates: number of bootstrap replicates.
        seed: random seed.
        confidence: level of the intervals, between 0 and 1.

    Returns:
        Interval by rate; None for rates that are not measured.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> person = np.arange(40) % 8
        >>> same = np.tile([True, False], 20)
        >>> bootstrap_tpr_of_scores(np.where(same, 0.9, 0.1), same, (person, person + ~same), ["0.5"])
        {'0.5': Interval(low=1.0, high=1.0)}
    """
    first, second = people
    draws = Draws(1 + max(int(first.max()), int(second.max())), replicates, seed, confidence)
    pairs = _listed_pairs(np.asarray(scores, np.float32), np.asarray(same, np.bool_), first, second)
    return _tpr_intervals(pairs, draws, fprs)


def _listed_pairs(
    cosines: Scores,
    genuine: npt.NDArray[np.bool_],
    first: npt.NDArray[np.integer[Any]],
    second: npt.NDArray[np.integer[Any]],
) -> WeighedPairs:
    of_one, of_two = (
        descending([OwnedScores(cosines[kind], first[kind], second[kind])]) for kind in (genuine, ~genuine)
    )
    return WeighedPairs(of_one, of_two, functools.partial(_sum_of_weights, of_two))


def _sum_of_weights(pairs: OwnedScores, weights: Ints) -> int:
    starts = range(0, len(pairs.scores), _BLOCK)
    parts = (slice(start, start + _BLOCK) for start in starts)
    return sum(int(weights[pairs.first[part]] @ weights[pairs.second[part]]) for part in parts)


def _tpr_intervals(pairs: WeighedPairs, draws: Draws, fprs: Sequence[str]) -> dict[str, Interval | None]:
    """Return the interval of each rate over pairs whose impostors are all kept."""
    measured = [fpr for fpr, rank in ranks_of(fprs, len(pairs.impostors.scores)).items() if rank is not None]
    table = draws.each(functools.partial(pairs.tprs, fprs=measured))
    tprs = {fpr: draws.interval(table[:, at]) for at, fpr in enumerate(measured)}
    return {fpr: tprs.get(fpr) for fpr in fprs}


def _accuracy(scores: Scores, same: npt.NDArray[np.bool_], fold: npt.NDArray[np.int64], counts: Ints) -> float:
    try:
        if len(np.unique(fold)) == 1:
            return single_fold_accuracy(scores, same, counts)
        return ten_fold_accuracy(scores, same, fold, counts)[0]
    except PairsError:  # the replicate lacks pairs that the folds need
        return float("nan")


def _units(pairs: int, people: tuple[npt.ArrayLike, npt.ArrayLike] | None) -> tuple[Ints, Ints, int, int]:
    """Return resampling units of both images of each pair, the number of units, and that of fixed units.

    For unknown identities, each pair is a unit, and a fixed unit of weight 1 stands for all second images.
    """
    if people is None:
        return np.arange(pairs), np.full(pairs, pairs), pairs, 1
    names, numbers = np.unique(np.concatenate([np.asarray(side) for side in people]), return_inverse=True)
    numbers = numbers.reshape(-1).astype(np.int64)
    return numbers[:pairs], numbers[pairs:], len(names), 0


class Draws:
    """Bootstrap replicates, as integer weights of resampling units (identities).

    Args:
        units: number of units.
        replicates: number of replicates.
        seed: random seed.
        confidence: level of the intervals, between 0 and 1.
        fixed: number of further units, after the others, with weight 1 in every replicate.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, units: int, replicates: int, seed: int, confidence: float, fixed: int = 0) -> None:
        check_whole(1, replicates=replicates)
        check_seed(seed)
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be a number between 0 and 1, such as 0.95, got {confidence}")
        self.confidence = confidence
        self._units, self._replicates, self._seed, self._fixed = units, replicates, seed, fixed

    def each(self, measure: Callable[[Ints], Floats | float]) -> Floats:
        """Call ``measure`` with weights of 1, then with the weights of each replicate; stack the results."""
        rng = np.random.default_rng(self._seed)
        shares = np.full(self._units, 1 / self._units)
        found = [measure(np.ones(self._units + self._fixed, np.int64))]
        for _ in range(self._replicates):
            drawn = rng.multinomial(self._units, shares)
            found.append(measure(np.concatenate([drawn, np.ones(self._fixed, np.int64)])))
        return np.array(found, np.float64)

    def interval(self, values: Floats) -> Interval | None:
        """Return the percentile interval of values from :meth:`each`; None if all replicates are NaN."""
        replicates = values[1:][~np.isnan(values[1:])]
        if not len(replicates):
            return None
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(replicates, [outside, 1 - outside])
        return Interval(float(low), float(high))


def images_of(labels: npt.ArrayLike) -> Ints:
    """Count the images of each identity, [identities], in the order of labels."""
    return np.unique(np.asarray(labels), return_counts=True)[1].astype(np.int64)


def each_draw(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str],
    gallery: Scores | None,
    draws: Draws,
    measure: Callable[..., Floats],
) -> dict[str, Floats | None]:
    """Evaluate ``measure`` on each replicate at the replicate's threshold for each rate.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        fprs: rates as decimals; the keys of the result.
        gallery: embeddings of the same images by another model; see :func:`qface.evaluation.tpr_at_fpr`.
        draws: replicates of the identities.
        measure: function of :class:`WeighedPairs`, weights of identities and ``fprs`` that returns metrics [fprs, ...];
            they are inf if the threshold is below the impostor scores that are kept.

    Returns:
        Metrics [1 + replicates, ...] by rate, with the original identities first; None if too few or too many
        impostors are accepted.
    """
    scores = PairScores(probes, labels, gallery)
    ranks = ranks_of(fprs, count_pairs(labels, scores.ordered)[1])
    measured = {fpr: rank for fpr, rank in ranks.items() if rank is not None}
    return dict.fromkeys(fprs) | _each_draw_at_ranks(scores, labels, measured, draws, measure)


def _each_draw_at_ranks(
    scores: PairScores,
    labels: npt.ArrayLike,
    ranks: Mapping[str, int],
    draws: Draws,
    measure: Callable[..., Floats],
) -> dict[str, Floats | None]:
    """Evaluate ``measure`` on each replicate with as many impostor scores as its thresholds need.

    Args:
        scores: scores of all pairs.
        labels: [images], identity labels.
        ranks: rank of the threshold among the impostor scores, by rate; the keys of the result.
        draws: replicates of the identities.
        measure: see :func:`each_draw`.

    Returns:
        Metrics [1 + replicates, ...] by rate; None if too many impostors are accepted.
    """
    images, impostors = images_of(labels), count_pairs(labels, scores.ordered)[1]
    wanted = [fpr for fpr, rank in ranks.items() if _with_margin(rank) <= _MAX_KEPT]
    most = min(impostors, _MAX_KEPT)
    kept = min(most, _with_margin(max((ranks[fpr] for fpr in wanted), default=0)))
    found: dict[str, Floats | None] = dict.fromkeys(ranks)
    while wanted:
        pairs = _kept_pairs(scores, kept, impostors, images)
        table = draws.each(functools.partial(measure, pairs, fprs=wanted))
        suffices = [not np.isinf(table[:, at]).any() for at in range(len(wanted))]
        found |= {fpr: table[:, at] for at, fpr in enumerate(wanted) if suffices[at]}
        wanted = [fpr for at, fpr in enumerate(wanted) if not suffices[at] and kept < most]
        kept = min(max(1, 2 * kept), most)
    return found


def _with_margin(rank: int) -> int:
    """Return the number of scores to keep for ``rank``, which replicates shift by some ten percent."""
    return rank + rank // 2 + 1000


def _kept_pairs(scores: PairScores, kept: int, impostors: int, images: Ints) -> WeighedPairs:
    """Keep all genuine and the ``kept`` highest impostor scores, without those equal to the next one."""
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
    """Concatenate ``parts`` and sort by score in descending order."""
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores)
    first, second = (np.concatenate([getattr(part, side) for part in parts]) for side in ("first", "second"))
    return OwnedScores(scores[order], first[order], second[order])


@dataclass(frozen=True)
class WeighedPairs:
    """Scores in descending order, for weighted TPR at FPR.

    Args:
        genuine: all genuine scores.
        impostors: the highest impostor scores.
        total: function from the weights of identities to the total weight of all impostor pairs.
    """

    genuine: OwnedScores
    impostors: OwnedScores
    total: Callable[[Ints], int]

    def tprs(self, weights: Ints, fprs: Sequence[str]) -> Floats:
        """Compute the true-positive rate at each rate; inf below the kept impostor scores, NaN without pairs."""
        owned = _cumulative(weights[self.genuine.first])
        total = self.total(weights)
        if not owned[-1] or not total:
            return np.full(len(fprs), np.nan)
        thresholds = self._thresholds(weights, fprs, total)
        accepted = np.searchsorted(-self.genuine.scores, -thresholds, side="left")
        return np.where(np.isinf(thresholds), np.inf, owned[accepted] / owned[-1])

    def equal_error(self, weights: Ints) -> float:
        """Compute the equal error rate; inf below the kept impostor scores, NaN without pairs."""
        owned, total = _cumulative(weights[self.genuine.first]), self.total(weights)
        if not owned[-1] or not total:
            return float("nan")
        above = _cumulative(weights[self.impostors.first] * weights[self.impostors.second])
        accepted_genuine, accepted_impostors = self._accepted_above_impostors
        missed = (owned[-1] - owned[accepted_genuine]) / owned[-1]
        false = above[accepted_impostors] / total
        if above[-1] < total and not (false >= missed).any():
            return float("inf")
        return float(np.maximum(false, missed).min(initial=1.0))

    @functools.cached_property
    def _accepted_above_impostors(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Numbers of genuine and of impostor scores above each impostor score."""
        descending_thresholds = -self.impostors.scores
        of_genuine = np.searchsorted(-self.genuine.scores, descending_thresholds, side="left")
        return of_genuine, np.searchsorted(descending_thresholds, descending_thresholds, side="left")

    def thresholds_at(self, weights: Ints, fprs: Sequence[str]) -> Scores:
        """Return the impostor scores at the weighted ranks of ``fprs``; -inf below the kept scores."""
        return self._thresholds(weights, fprs, self.total(weights))

    def _thresholds(self, weights: Ints, fprs: Sequence[str], total: int) -> Scores:
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


def _cumulative(weights: Ints) -> Ints:
    """Return the sums of the first 0, 1, ... weights."""
    sums: Ints = np.concatenate([[0], np.cumsum(weights)])
    return sums
