"""Verification metrics: TPR at fixed FPR over all pairs, and the ten-fold accuracy of LFW.

Both are exact: each threshold is computed from the scores themselves, not from histogram bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.errors import ConfigError, ImagesError, PairsError, QFaceError
from qface.evaluation.pair_scores import PairScores, Scores
from qface.evaluation.score_ranking import count_store, equal_error_of, ranked_scores
from qface.parallel import processes_for
from qface.progress import shows_progress

__all__ = [
    "FPRS",
    "MIN_FALSE_POSITIVES",
    "OperatingPoint",
    "Rates",
    "count_pairs",
    "equal_error_rate",
    "equal_error_rate_of_scores",
    "finest_rate",
    "impostors_needed",
    "ranks_of",
    "rates_at",
    "single_fold_accuracy",
    "ten_fold_accuracy",
    "tpr_at_fpr",
    "tpr_at_fpr_of_scores",
    "unmeasured",
    "usable_folds",
]

FPRS = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
"""Reported false-positive rates, as exact decimals."""

MIN_FALSE_POSITIVES = 10
"""Minimum number of accepted impostors; with fewer, a threshold depends more on them than on the model."""


@dataclass(frozen=True)
class OperatingPoint:
    """Operating point of a model at one false-positive rate.

    Args:
        tpr: fraction of genuine pairs accepted, 0..1; None if there are too few impostor pairs.
        threshold: cosine above which a pair is accepted; None likewise.
    """

    tpr: float | None
    threshold: float | None


@dataclass(frozen=True)
class Rates:
    """True-positive and false-positive rate at a threshold.

    Args:
        tpr: fraction of genuine pairs accepted, 0..1.
        fpr: fraction of impostor pairs accepted, 0..1.
    """

    tpr: float
    fpr: float


def count_pairs(labels: npt.ArrayLike, ordered: bool = False) -> tuple[int, int]:
    """Count the genuine and the impostor pairs of all images.

    Args:
        labels: [images], identity labels of any type.
        ordered: count (i, j) and (j, i) as two pairs.

    Returns:
        Number of genuine pairs and number of impostor pairs.

    Raises:
        ImagesError: one of the two numbers is zero.
    """
    images_of = np.unique(np.asarray(labels), return_counts=True)[1].astype(object)  # Python integers cannot overflow
    images = int(images_of.sum())
    genuine = int((images_of * (images_of - 1)).sum()) // 2
    impostor = images * (images - 1) // 2 - genuine
    if len(images_of) < 2:
        raise ImagesError(f"verification needs images of at least two identities, got {len(images_of)}: add images")
    if not genuine:
        raise ImagesError("there are no genuine pairs: pass at least two images of some identity")
    return (2 * genuine, 2 * impostor) if ordered else (genuine, impostor)


@shows_progress
def tpr_at_fpr(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    gallery: Scores | None = None,
    run_dir: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, OperatingPoint]:
    """Compute the true-positive rate at fixed false-positive rates over all pairs of images.

    With n impostor pairs, the threshold at the rate f is element floor(n f) (from 0) of their cosines in descending
    order. Pairs with a larger cosine are accepted, so at most floor(n f) impostors are. Rates with n f < 10 are not
    measured.

    Scores are counted while they are computed (:mod:`qface.evaluation.score_counts`), so memory is the embeddings plus
    0.5 GB for any number of pairs. Under ``torchrun`` the processes share the pairs, and all return the same result.

    Args:
        probes: float32 [images, dimensions], L2-normalized, in memory or memory-mapped.
        labels: [images], identity labels.
        fprs: rates as decimals between 0 and 1, such as ``"1e-4"``; the keys of the result.
        gallery: embeddings of the same images by another model; all ordered pairs i != j of probe and gallery are then
            compared. None: all pairs i < j of probes.
        run_dir: folder for the counts, from which an interrupted call resumes. None saves nothing.
        device: torch device for the cosines. None: a GPU if there is one.
        progress: show progress on stderr.

    Returns:
        Operating point by rate; its fields are None for rates that are not measured.

    Raises:
        ImagesError: there are no genuine or no impostor pairs.
        ConfigError: a rate is not a decimal between 0 and 1, the device is unknown, ``run_dir`` holds data of other
            embeddings, or another run is using it.
        DependencyError: several processes without Lightning Fabric.
        ExportError: ``run_dir`` is not writable.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> faces = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 3, 3]]
        >>> tpr_at_fpr(faces, [0, 0, 1, 1, 2, 2, 3, 3], ["0.5"])["0.5"].tpr
        1.0
    """
    parallel = processes_for(device)
    scores = PairScores(probes, labels, gallery, parallel.device)
    genuine, impostors = count_pairs(labels, scores.ordered)
    ranks = ranks_of(fprs, impostors)
    measured = {fpr: rank for fpr, rank in ranks.items() if rank is not None}
    kept = nullcontext() if run_dir is None else count_store(Path(run_dir), scores, measured, parallel)
    with kept as store:
        ranked = ranked_scores(scores, measured, impostors, parallel, store)
    points = {fpr: OperatingPoint(each.genuine_above / genuine, each.score) for fpr, each in ranked.items()}
    return {fpr: points.get(fpr, OperatingPoint(None, None)) for fpr in fprs}


def tpr_at_fpr_of_scores(
    scores: npt.ArrayLike, same: npt.ArrayLike, fprs: Sequence[str] = FPRS
) -> dict[str, OperatingPoint]:
    """Compute the true-positive rate at fixed false-positive rates over listed pairs.

    Thresholds are defined as in :func:`tpr_at_fpr`.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], True for genuine pairs.
        fprs: rates as decimals between 0 and 1; the keys of the result.

    Returns:
        Operating point by rate; its fields are None for rates that are not measured.

    Raises:
        PairsError: there are no genuine or no impostor pairs.
        ConfigError: a rate is not a decimal between 0 and 1.
        QFaceError: a score is not finite.
    """
    genuine, impostors = _both_kinds(scores, same)
    return _operating_points(ranks_of(fprs, len(impostors)), genuine, impostors[::-1])


def equal_error_rate(
    probes: Scores, labels: npt.ArrayLike, gallery: Scores | None = None, device: str | None = None
) -> float:
    """Compute the equal error rate over all pairs of images.

    It is the minimum over all thresholds of max(FPR, 1 - TPR). The result is exact and takes two passes.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        gallery: as in :func:`tpr_at_fpr`, with the same pairs.
        device: torch device for the cosines. None: a GPU if there is one.

    Returns:
        A fraction, 0..1.

    Raises:
        ConfigError: the device is unknown.
        ImagesError: there are no genuine or no impostor pairs.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> equal_error_rate(np.eye(2, dtype=np.float32)[[0, 0, 1, 1]], [0, 0, 1, 1])
        0.0
    """
    parallel = processes_for(device)
    scores = PairScores(probes, labels, gallery, parallel.device)
    return equal_error_of(scores, *count_pairs(labels, scores.ordered), parallel)


def equal_error_rate_of_scores(scores: npt.ArrayLike, same: npt.ArrayLike) -> float:
    """Compute the equal error rate over listed pairs, as in :func:`equal_error_rate`.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], True for genuine pairs.

    Returns:
        A fraction, 0..1.

    Raises:
        PairsError: there are no genuine or no impostor pairs.
        QFaceError: a score is not finite.

    Example:
        >>> equal_error_rate_of_scores([0.9, 0.4, 0.5, 0.1], [True, True, False, False])
        0.5
    """
    genuine, impostors = _both_kinds(scores, same)
    thresholds = np.concatenate([[-np.inf], impostors])
    missed = np.searchsorted(genuine, thresholds, side="right") / len(genuine)
    false = 1 - np.searchsorted(impostors, thresholds, side="right") / len(impostors)
    return float(np.maximum(missed, false).min())


def _both_kinds(scores: npt.ArrayLike, same: npt.ArrayLike) -> tuple[Scores, Scores]:
    """Return genuine and impostor scores in ascending order."""
    cosines, genuine = np.asarray(scores, np.float32), np.asarray(same, np.bool_)
    if genuine.all() or not genuine.any():
        raise PairsError("the pair list needs both genuine and impostor pairs: restore the list")
    _check_scores(cosines)
    return np.sort(cosines[genuine]), np.sort(cosines[~genuine])


def _check_scores(scores: npt.NDArray[np.floating[Any]]) -> None:
    if not np.isfinite(scores).all():
        raise QFaceError("the scores are not finite: check the model's weights and scales")


def rates_at(threshold: float, probes: Scores, labels: npt.ArrayLike, gallery: Scores | None = None) -> Rates:
    """Compute TPR and FPR at a threshold over all pairs of images.

    Args:
        threshold: cosine above which a pair is accepted.
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        gallery: as in :func:`tpr_at_fpr`, with the same pairs.

    Raises:
        ImagesError: there are no genuine or no impostor pairs.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.
    """
    scores = PairScores(probes, labels, gallery)
    genuine, impostors = count_pairs(labels, scores.ordered)
    accepted = np.zeros(2, np.int64)
    for tile in scores.tiles():
        accepted += [len(kind) for kind in scores.of(tile, float(np.float32(threshold)))]
    return Rates(int(accepted[0]) / genuine, int(accepted[1]) / impostors)


def ranks_of(
    fprs: Sequence[str], impostors: int, min_false_positives: int = MIN_FALSE_POSITIVES
) -> dict[str, int | None]:
    """Return the rank of the threshold score at each rate: floor(impostors x rate), computed exactly.

    Args:
        fprs: rates as decimals between 0 and 1; the keys of the result.
        impostors: number of impostor pairs.
        min_false_positives: minimum number of accepted impostor pairs.

    Returns:
        Rank by rate; None if there are too few impostor pairs.

    Raises:
        ConfigError: a rate is not a decimal between 0 and 1.
    """
    return {fpr: _rank(fpr, impostors, min_false_positives) for fpr in fprs}


def unmeasured(fprs: Sequence[str], impostors: int) -> str | None:
    """Explain why a rate cannot be measured, for error messages.

    Args:
        fprs: rates as decimals between 0 and 1.
        impostors: number of impostor pairs.

    Returns:
        Reason and advice for the largest rate that is not measured; None if all are measured.

    Raises:
        ConfigError: a rate is not a decimal between 0 and 1.

    Example:
        >>> unmeasured(["1e-4"], 14587)
        'FPR 1e-4 needs 100,000 impostor pairs, there are 14,587: use 1e-3, or more people'
    """
    lacking = [fpr for fpr, rank in ranks_of(fprs, impostors).items() if rank is None]
    if not lacking:
        return None
    fpr = max(lacking, key=Fraction)
    finest = finest_rate(impostors)
    advice = "use more people" if finest is None else f"use {finest}, or more people"
    return f"FPR {fpr} needs {impostors_needed(fpr):,} impostor pairs, there are {impostors:,}: {advice}"


def finest_rate(impostors: int) -> str | None:
    """Return the minimum of :data:`FPRS` that ``impostors`` pairs suffice for, or None."""
    return next((rate for rate, rank in reversed(ranks_of(FPRS, impostors).items()) if rank is not None), None)


def impostors_needed(fpr: str) -> int:
    """Return the minimum number of impostor pairs to measure the rate ``fpr``, a decimal between 0 and 1."""
    return math.ceil(MIN_FALSE_POSITIVES / Fraction(fpr))


def _rank(fpr: str, impostors: int, min_false_positives: int) -> int | None:
    try:
        # A float first, because Fraction would compute ten to the power of any exponent.
        rate = Fraction(fpr) if 0 < float(fpr) < 1 else Fraction(0)
    except ValueError:
        rate = Fraction(0)
    if not 0 < rate < 1:
        raise ConfigError(f"a false-positive rate must be a decimal between 0 and 1 such as '1e-4', got {fpr!r}")
    rank = int(impostors * rate)
    return rank if rank >= min_false_positives else None


def _operating_points(ranks: dict[str, int | None], genuine: Scores, impostors: Scores) -> dict[str, OperatingPoint]:
    points = {}
    for fpr, rank in ranks.items():
        if rank is None:
            points[fpr] = OperatingPoint(None, None)
            continue
        rejected = int(np.searchsorted(genuine, impostors[rank], side="right"))
        points[fpr] = OperatingPoint((len(genuine) - rejected) / len(genuine), float(impostors[rank]))
    return points


def ten_fold_accuracy(
    scores: npt.ArrayLike, same: npt.ArrayLike, fold: npt.ArrayLike, counts: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """Compute mean and standard deviation of the accuracy over the folds of a pair list (ten in LFW).

    Each fold is tested at the threshold that is best on all other folds. Accuracy is the mean of TPR and TNR: equal to
    LFW's accuracy on its balanced folds, and still meaningful if a selection of identities unbalances them. The
    standard deviation is ``np.std`` over folds, as in InsightFace. Folds without genuine or without impostor pairs are
    skipped.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], True for genuine pairs.
        fold: int [pairs], fold of each pair.
        counts: int [pairs], weight of each pair. None: 1 each.

    Returns:
        Mean and standard deviation, as fractions 0..1.

    Raises:
        PairsError: fewer than two folds have both kinds of pairs.
        QFaceError: a score is not finite.
    """
    scores, same, fold = np.asarray(scores, np.float64), np.asarray(same, np.bool_), np.asarray(fold)
    counts = _counts(counts, len(scores))
    _check_scores(scores)
    accuracies = []
    for k in usable_folds(same[counts > 0], fold[counts > 0]):
        held_out, others = fold == k, fold != k
        threshold = _best_threshold(scores[others], same[others], counts[others])
        accuracies.append(_balanced_accuracy(scores[held_out] > threshold, same[held_out], counts[held_out]))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def single_fold_accuracy(scores: npt.ArrayLike, same: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> float:
    """Compute the accuracy over a pair list of one fold, at the threshold that is best on the same pairs.

    It is an upper bound of :func:`ten_fold_accuracy`, because no pairs are held out.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], True for genuine pairs.
        counts: int [pairs], weight of each pair. None: 1 each.

    Returns:
        A fraction, 0..1.

    Raises:
        PairsError: there are no genuine or no impostor pairs.
        QFaceError: a score is not finite.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, np.bool_)
    counts = _counts(counts, len(scores))
    _check_scores(scores)
    if len(np.unique(same[counts > 0])) < 2:
        raise PairsError("the pair list needs both genuine and impostor pairs: restore the list")
    return _balanced_accuracy(scores > _best_threshold(scores, same, counts), same, counts)


def _counts(counts: npt.ArrayLike | None, pairs: int) -> npt.NDArray[np.int64]:
    return np.ones(pairs, np.int64) if counts is None else np.asarray(counts, np.int64)


def usable_folds(same: npt.ArrayLike, fold: npt.ArrayLike) -> list[int]:
    """Return the folds with both genuine and impostor pairs.

    Args:
        same: bool [pairs], True for genuine pairs.
        fold: int [pairs], fold of each pair.

    Raises:
        PairsError: there are fewer than two such folds.
    """
    same, fold = np.asarray(same, np.bool_), np.asarray(fold)
    usable = [int(k) for k in np.unique(fold) if len(np.unique(same[fold == k])) == 2]
    if len(usable) < 2:
        raise PairsError(
            f"{len(usable)} of {len(np.unique(fold))} folds have both genuine and impostor pairs, "
            "but two are needed: select more identities, or pass pairs with more folds"
        )
    return usable


def _best_threshold(
    scores: npt.NDArray[np.float64], same: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]
) -> float:
    """Return the threshold with the best balanced accuracy (midway between scores; the highest if tied)."""
    scores, same, counts = scores[counts > 0], same[counts > 0], counts[counts > 0]
    order = np.argsort(-scores, kind="stable")
    descending, accepted, times = scores[order], same[order], counts[order]
    true_positives, false_positives = np.cumsum(accepted * times), np.cumsum(~accepted * times)
    # (TPR - FPR) times both counts, in integers, so that rounding cannot break ties
    quality = true_positives * false_positives[-1] - false_positives * true_positives[-1]
    quality[:-1][descending[:-1] == descending[1:]] = np.iinfo(quality.dtype).min  # no cut between equal scores
    last = int(np.argmax(quality))
    if last + 1 == len(descending):
        return float("-inf")
    upper, lower = float(descending[last]), float(descending[last + 1])
    middle = (lower + upper) / 2
    return middle if middle < upper else lower


def _balanced_accuracy(
    accepted: npt.NDArray[np.bool_], same: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]
) -> float:
    """Return the mean of TPR and TNR."""
    right = np.where(accepted == same, counts, 0)
    return float(right[same].sum() / counts[same].sum() + right[~same].sum() / counts[~same].sum()) / 2
