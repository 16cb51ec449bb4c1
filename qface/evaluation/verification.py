"""Verification figures: TPR at fixed FPR over all pairs, and the ten-fold accuracy of LFW.

Both are exact: a threshold is a score of the rank that was asked for.
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
"""The false-positive rates that are reported, as exact decimals."""

_MIN_FALSE_POSITIVES = 10
"""Below this many accepted impostors, a threshold says more about them than about the model."""


@dataclass(frozen=True)
class OperatingPoint:
    """The operating point of a model at one false-positive rate.

    Args:
        tpr: share of genuine pairs accepted, 0..1; None where there are too few impostor pairs to tell.
        threshold: pairs with a larger cosine are accepted; None likewise.
    """

    tpr: float | None
    threshold: float | None


@dataclass(frozen=True)
class Rates:
    """Shares of pairs that a threshold accepts.

    Args:
        tpr: share of genuine pairs, 0..1.
        fpr: share of impostor pairs.
    """

    tpr: float
    fpr: float


def count_pairs(labels: npt.ArrayLike, ordered: bool = False) -> tuple[int, int]:
    """Number of genuine and of impostor pairs among images with ``labels``.

    Args:
        labels: [images], anything that tells identities apart.
        ordered: count (i, j) and (j, i) as two pairs.

    Raises:
        ImagesError: one of the two numbers is zero.
    """
    images_of = np.unique(np.asarray(labels), return_counts=True)[1].astype(object)  # Python's integers: exact
    images = int(images_of.sum())
    genuine = int((images_of * (images_of - 1)).sum()) // 2
    impostor = images * (images - 1) // 2 - genuine
    if len(images_of) < 2:
        raise ImagesError(f"verification needs images of at least two people, not of {len(images_of)}")
    if not genuine:
        raise ImagesError("verification needs genuine pairs: give at least one person two images")
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
    """True-positive rate at fixed false-positive rates over all pairs of images.

    With n impostor pairs, the threshold for a rate f is the element floor(n f) of their cosines in descending
    order, and a pair is accepted when its cosine is larger: at most floor(n f) impostors are. A rate with
    n f < 10 is not measured.

    Scores are counted as they are computed (:mod:`qface.evaluation.score_counts`): memory is that of the embeddings and
    half a gigabyte, however many pairs there are. Under ``torchrun`` the processes share the pairs, and all return the
    same.

    Args:
        probes: float32 [images, dimensions], L2-normalized; in memory, or mapped from a file.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``, between 0 and 1; they are the keys of the result.
        gallery: the same images embedded by another model. Then all ordered pairs i != j of a probe and a
            gallery image count; without it, all pairs i < j.
        run_dir: folder to keep the counts in; a call that was stopped goes on there. None keeps nothing.
        device: where cosines are computed, as torch names it; None takes a GPU where there is one.
        progress: show the stages on stderr.

    Raises:
        ImagesError: there are no genuine or no impostor pairs.
        ConfigError: a rate is no such decimal, there is no such device, ``run_dir`` is of other embeddings, or another
            run is in it.
        DependencyError: several processes without Lightning Fabric.
        ExportError: ``run_dir`` cannot be written to.
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
    """True-positive rate at fixed false-positive rates over listed pairs; :func:`tpr_at_fpr` says how.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], whether both sides show one person.
        fprs: rates as decimals, between 0 and 1; they are the keys of the result.

    Raises:
        PairsError: there are no genuine or no impostor pairs.
        ConfigError: a rate is no such decimal.
        QFaceError: a score is not finite.
    """
    genuine, impostors = _both_kinds(scores, same)
    return _operating_points(ranks_of(fprs, len(impostors)), genuine, impostors[::-1])


def equal_error_rate(
    probes: Scores, labels: npt.ArrayLike, gallery: Scores | None = None, device: str | None = None
) -> float:
    """Equal error rate over all pairs of images.

    It is the smallest e for which some threshold accepts at most a share e of impostor pairs and rejects at most a
    share e of genuine ones: the least of the greater of both rates, over all thresholds. It is exact, in two passes.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        gallery: see :func:`tpr_at_fpr`, whose pairs are the same.
        device: where cosines are computed; None takes a GPU where there is one.

    Returns:
        A share, 0..1.

    Raises:
        ConfigError: there is no such device.
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
    """Equal error rate over listed pairs, as :func:`equal_error_rate` defines it.

    Args:
        scores: float32 [pairs], cosines.
        same: bool [pairs], whether both sides show one person.

    Returns:
        A share, 0..1.

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
    """Genuine and impostor scores, ascending."""
    cosines, genuine = np.asarray(scores, np.float32), np.asarray(same, np.bool_)
    if genuine.all() or not genuine.any():
        raise PairsError("verification needs pairs of one person and pairs of two: restore the list")
    _check_scores(cosines)
    return np.sort(cosines[genuine]), np.sort(cosines[~genuine])


def _check_scores(scores: npt.NDArray[np.floating[Any]]) -> None:
    if not np.isfinite(scores).all():
        raise QFaceError("the scores are not finite: check the model's weights and scales")


def rates_at(threshold: float, probes: Scores, labels: npt.ArrayLike, gallery: Scores | None = None) -> Rates:
    """The shares of genuine and impostor pairs whose cosine is larger than ``threshold``.

    Args:
        threshold: a cosine.
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        gallery: see :func:`tpr_at_fpr`, whose pairs are the same.

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


def ranks_of(fprs: Sequence[str], impostors: int) -> dict[str, int | None]:
    """For each rate, the rank of the score that is its threshold: floor(impostors x rate), in exact arithmetic.

    Args:
        fprs: rates as decimals, between 0 and 1; they are the keys of the result.
        impostors: number of impostor pairs.

    Returns:
        None for a rate with too few impostors to measure it.

    Raises:
        ConfigError: a rate is no such decimal.
    """
    return {fpr: _rank(fpr, impostors) for fpr in fprs}


def unmeasured(fprs: Sequence[str], impostors: int) -> str | None:
    """Why the largest of ``fprs`` that is not measured is not, and which rate to use; None where all are measured.

    Args:
        fprs: rates as decimals, between 0 and 1.
        impostors: number of impostor pairs.

    Raises:
        ConfigError: a rate is no such decimal.

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
    """The least of :data:`FPRS` that so many impostor pairs measure; None where they measure none."""
    return next((rate for rate, rank in reversed(ranks_of(FPRS, impostors).items()) if rank is not None), None)


def impostors_needed(fpr: str) -> int:
    """Impostor pairs that measure the rate ``fpr``, a decimal between 0 and 1."""
    return math.ceil(_MIN_FALSE_POSITIVES / Fraction(fpr))


def _rank(fpr: str, impostors: int) -> int | None:
    try:
        # A float first: Fraction would write out ten to the power of any exponent.
        rate = Fraction(fpr) if 0 < float(fpr) < 1 else Fraction(0)
    except ValueError:
        rate = Fraction(0)
    if not 0 < rate < 1:
        raise ConfigError(f"a false-positive rate is a decimal between 0 and 1 such as '1e-4', not {fpr!r}")
    rank = int(impostors * rate)
    return rank if rank >= _MIN_FALSE_POSITIVES else None


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
    """Mean and standard deviation of the accuracy over the folds of a pair list (LFW's view 2 has ten).

    Each fold is judged at the threshold that is best on all other folds. Accuracy is the mean of TPR and TNR:
    LFW's own accuracy on its balanced folds, and meaningful still where a selection of people unbalances them.
    The deviation is the population's over folds (``np.std``), as InsightFace reports it. A fold that has lost
    all its same or all its different pairs is not judged.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], whether both images show one person.
        fold: int [pairs].
        counts: int [pairs], how often each pair counts; None counts each once.

    Raises:
        PairsError: fewer than two folds can be judged.
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
    """Accuracy over a pair list of one fold, at the threshold that is best on its own pairs.

    No pairs are left to choose it on, so this is an upper bound of what :func:`ten_fold_accuracy` would say.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], whether both images show one person.
        counts: int [pairs], how often each pair counts; None counts each once.

    Raises:
        PairsError: there are pairs of one kind alone.
        QFaceError: a score is not finite.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, np.bool_)
    counts = _counts(counts, len(scores))
    _check_scores(scores)
    if len(np.unique(same[counts > 0])) < 2:
        raise PairsError("verification needs pairs of one person and pairs of two: restore the list")
    return _balanced_accuracy(scores > _best_threshold(scores, same, counts), same, counts)


def _counts(counts: npt.ArrayLike | None, pairs: int) -> npt.NDArray[np.int64]:
    return np.ones(pairs, np.int64) if counts is None else np.asarray(counts, np.int64)


def usable_folds(same: npt.ArrayLike, fold: npt.ArrayLike) -> list[int]:
    """The folds that hold both kinds of pairs.

    Args:
        same: bool [pairs], whether both images show one person.
        fold: int [pairs].

    Raises:
        PairsError: there are fewer than two.
    """
    same, fold = np.asarray(same, np.bool_), np.asarray(fold)
    usable = [int(k) for k in np.unique(fold) if len(np.unique(same[fold == k])) == 2]
    if len(usable) < 2:
        raise PairsError(
            f"{len(usable)} of {len(np.unique(fold))} folds hold both same and different pairs, "
            "but two are needed: select more people, or pass pairs with more folds"
        )
    return usable


def _best_threshold(
    scores: npt.NDArray[np.float64], same: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]
) -> float:
    """The cut with the best balanced accuracy, midway between two scores; of several, the highest."""
    scores, same, counts = scores[counts > 0], same[counts > 0], counts[counts > 0]
    order = np.argsort(-scores, kind="stable")
    descending, accepted, times = scores[order], same[order], counts[order]
    true_positives, false_positives = np.cumsum(accepted * times), np.cumsum(~accepted * times)
    # TPR - FPR times both counts: whole numbers, so that rounding decides no tie
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
    """The mean of the shares of same pairs accepted and of different ones rejected."""
    right = np.where(accepted == same, counts, 0)
    return float(right[same].sum() / counts[same].sum() + right[~same].sum() / counts[~same].sum()) / 2
