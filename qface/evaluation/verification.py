"""Verification figures: TPR at fixed FPR over all pairs, and the ten-fold accuracy of LFW.

Both are exact: no bins, no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.errors import ConfigError, ImagesError, PairsError, QFaceError

__all__ = [
    "FPRS",
    "OperatingPoint",
    "Rates",
    "count_pairs",
    "ranks_of",
    "rates_at",
    "single_fold_accuracy",
    "ten_fold_accuracy",
    "tpr_at_fpr",
    "tpr_at_fpr_of_scores",
    "usable_folds",
]

FPRS = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
"""The false-positive rates that are reported, as exact decimals."""

_MIN_FALSE_POSITIVES = 10
"""Below this many accepted impostors, a threshold says more about them than about the model."""

_MOST_RANKED = 2**29
"""Scores to sort, in 8 GB: the highest tenth of all pairs of 100,000 images."""

_BLOCK_SCORES = 2**23
"""Scores computed at a time: 32 MiB."""

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OperatingPoint:
    """How a model does at one false-positive rate.

    Args:
        tpr: share of genuine pairs accepted, 0..1; None where there are too few impostor pairs to tell.
        threshold: pairs with a larger cosine are accepted; None likewise.
    """

    tpr: float | None
    threshold: float | None


@dataclass(frozen=True)
class Rates:
    """What a threshold accepts.

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


def tpr_at_fpr(
    probes: Scores,
    labels: npt.ArrayLike,
    fprs: Sequence[str] = FPRS,
    gallery: Scores | None = None,
) -> dict[str, OperatingPoint]:
    """True-positive rate at fixed false-positive rates over all pairs of images.

    With n impostor pairs, the threshold for a rate f is the element floor(n f) of their cosines in descending
    order, and a pair is accepted when its cosine is larger: at most floor(n f) impostors are. A rate with
    n f < 10 is not measured.

    The scores pass by in blocks, and only what can decide is kept: the genuine cosines, and the highest n f
    impostors of the largest rate, which take up to 16 bytes each while they are being sorted out.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        fprs: rates as decimals, such as ``"1e-4"``, between 0 and 1; they are the keys of the result.
        gallery: the same images embedded by another model. Then all ordered pairs i != j of a probe and a
            gallery image count; without it, all pairs i < j.

    Raises:
        ImagesError: there are no genuine or no impostor pairs, or too many to rank.
        ConfigError: a rate is no such decimal.
        QFaceError: the embeddings do not match the labels or each other, or are not finite.
    """
    people = np.asarray(labels)
    _check_embeddings(probes, people, gallery)
    _, impostors = count_pairs(people, ordered=gallery is not None)
    ranks = ranks_of(fprs, impostors)
    highest = _Largest(1 + max((rank for rank in ranks.values() if rank is not None), default=0))
    genuine = []
    for same, different in _score_blocks(probes, people, gallery):
        genuine.append(same)
        highest.add(different)
    return _operating_points(ranks, np.sort(np.concatenate(genuine)), highest.descending())


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
    cosines, genuine = np.asarray(scores, np.float32), np.asarray(same, np.bool_)
    if genuine.all() or not genuine.any():
        raise PairsError("verification needs pairs of one person and pairs of two: restore the list")
    _check_scores(cosines)
    impostors = np.sort(cosines[~genuine])[::-1]
    ranks = ranks_of(fprs, len(impostors))
    return _operating_points(ranks, np.sort(cosines[genuine]), impostors)


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
    people = np.asarray(labels)
    _check_embeddings(probes, people, gallery)
    genuine, impostors = count_pairs(people, ordered=gallery is not None)
    accepted = np.zeros(2, np.int64)
    for scores in _score_blocks(probes, people, gallery):
        accepted += [np.count_nonzero(kind > np.float32(threshold)) for kind in scores]
    return Rates(int(accepted[0]) / genuine, int(accepted[1]) / impostors)


def _check_embeddings(probes: Scores, labels: npt.NDArray[np.generic], gallery: Scores | None) -> None:
    for name, embeddings in (("probes", probes), ("gallery", probes if gallery is None else gallery)):
        if embeddings.ndim != 2 or labels.shape != (len(embeddings),):
            raise QFaceError(
                f"{name} {list(embeddings.shape)} do not match labels {list(labels.shape)}: "
                "pass one row and one label an image"
            )
        if not np.isfinite(embeddings).all():
            raise QFaceError(f"the embeddings of the {name} are not finite: check the model's weights and scales")
    if gallery is not None and gallery.shape[1] != probes.shape[1]:
        raise QFaceError(
            f"probes have {probes.shape[1]} dimensions and the gallery {gallery.shape[1]}: "
            "compare models that share an embedding"
        )


def ranks_of(fprs: Sequence[str], impostors: int) -> dict[str, int | None]:
    """For each rate, the rank of the score that is its threshold: floor(impostors x rate), in exact arithmetic.

    Args:
        fprs: rates as decimals, between 0 and 1; they are the keys of the result.
        impostors: number of impostor pairs.

    Returns:
        None for a rate with too few impostors to measure it.

    Raises:
        ConfigError: a rate is no such decimal.
        ImagesError: there are more impostors to rank than memory should be asked for.
    """
    ranks = {fpr: _rank(fpr, impostors) for fpr in fprs}
    highest = max((rank for rank in ranks.values() if rank is not None), default=0)
    if highest > _MOST_RANKED:
        raise ImagesError(
            f"{highest} of {impostors} impostor pairs would have to be ranked, in {16 * highest / 1e9:.0f} GB: "
            "take fewer people or images"
        )
    return ranks


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


def _score_blocks(
    probes: Scores, labels: npt.NDArray[np.generic], gallery: Scores | None
) -> Iterator[tuple[Scores, Scores]]:
    """Yield the cosines of some genuine and some impostor pairs until all pairs are through.

    Sorted by label, a block of rows meets its own people in one range of columns only: masks are needed
    there, and all other columns are impostors as they are.
    """
    order = np.argsort(labels, kind="stable")
    people, rows = labels[order], probes[order]
    columns = rows if gallery is None else gallery[order]
    nothing = rows[:0, 0]
    height = max(1, _BLOCK_SCORES // len(rows))
    for start in range(0, len(rows), height):
        stop = min(start + height, len(rows))
        first = start if gallery is None else int(np.searchsorted(people, people[start]))
        last = int(np.searchsorted(people, people[stop - 1], side="right"))
        block = rows[start:stop]
        near = block @ columns[first:last].T
        same = people[start:stop, None] == people[None, first:last]
        offset = np.arange(first, last)[None, :] - np.arange(start, stop)[:, None]
        counted = offset > 0 if gallery is None else offset != 0
        yield near[same & counted], near[~same & counted]
        yield nothing, (block @ columns[last:].T).ravel()
        if gallery is not None:
            yield nothing, (block @ columns[:first].T).ravel()


class _Largest:
    """The ``count`` largest of the values seen so far, in memory for 1.25 x count of them and a block."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._chunks: list[Scores] = []
        self._held = 0
        self._bound = np.float32(-np.inf)

    def add(self, values: Scores) -> None:
        """Take ``values`` [any] into account."""
        # A value that equals the bound cannot change which value has which rank.
        chunk = values[values > self._bound]
        self._chunks.append(chunk)
        self._held += len(chunk)
        if self._held > self._count + max(self._count // 4, _BLOCK_SCORES):
            self._shrink()

    def _shrink(self) -> None:
        held = np.concatenate(self._chunks)
        held.partition(len(held) - self._count)
        kept = held[-self._count :].copy()
        self._chunks, self._held, self._bound = [kept], len(kept), kept[0]

    def descending(self) -> Scores:
        """The largest values [<= count], largest first."""
        return np.sort(np.concatenate(self._chunks))[::-1][: self._count]


def _operating_points(ranks: dict[str, int | None], genuine: Scores, impostors: Scores) -> dict[str, OperatingPoint]:
    points = {}
    for fpr, rank in ranks.items():
        if rank is None:
            points[fpr] = OperatingPoint(None, None)
            continue
        rejected = int(np.searchsorted(genuine, impostors[rank], side="right"))
        points[fpr] = OperatingPoint((len(genuine) - rejected) / len(genuine), float(impostors[rank]))
    return points


def ten_fold_accuracy(scores: npt.ArrayLike, same: npt.ArrayLike, fold: npt.ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over the folds of a pair list (LFW's view 2 has ten).

    Each fold is judged at the threshold that is best on all other folds. Accuracy is the mean of TPR and TNR:
    LFW's own accuracy on its balanced folds, and meaningful still where a selection of people unbalances them.
    The deviation is the population's over folds (``np.std``), as InsightFace reports it. A fold that has lost
    all its same or all its different pairs is not judged.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], whether both images show one person.
        fold: int [pairs].

    Raises:
        PairsError: fewer than two folds can be judged.
        QFaceError: a score is not finite.
    """
    scores, same, fold = np.asarray(scores, np.float64), np.asarray(same, np.bool_), np.asarray(fold)
    _check_scores(scores)
    accuracies = []
    for k in usable_folds(same, fold):
        held_out = fold == k
        threshold = _best_threshold(scores[~held_out], same[~held_out])
        accuracies.append(_balanced_accuracy(scores[held_out] > threshold, same[held_out]))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def single_fold_accuracy(scores: npt.ArrayLike, same: npt.ArrayLike) -> float:
    """Accuracy over a pair list of one fold, at the threshold that is best on its own pairs.

    No pairs are left to choose it on, so this is an upper bound of what :func:`ten_fold_accuracy` would say.

    Args:
        scores: [pairs], cosines.
        same: bool [pairs], whether both images show one person.

    Raises:
        PairsError: there are pairs of one kind alone.
        QFaceError: a score is not finite.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, np.bool_)
    _check_scores(scores)
    if len(np.unique(same)) < 2:
        raise PairsError("verification needs pairs of one person and pairs of two: restore the list")
    return _balanced_accuracy(scores > _best_threshold(scores, same), same)


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


def _best_threshold(scores: npt.NDArray[np.float64], same: npt.NDArray[np.bool_]) -> float:
    """The cut with the best balanced accuracy, midway between two scores; of several, the highest."""
    order = np.argsort(-scores, kind="stable")
    descending, accepted = scores[order], same[order]
    true_positives, false_positives = np.cumsum(accepted), np.cumsum(~accepted)
    # TPR - FPR times both counts: whole numbers, so that rounding decides no tie
    quality = true_positives * false_positives[-1] - false_positives * true_positives[-1]
    quality[:-1][descending[:-1] == descending[1:]] = np.iinfo(quality.dtype).min  # no cut between equal scores
    last = int(np.argmax(quality))
    if last + 1 == len(descending):
        return float("-inf")
    upper, lower = float(descending[last]), float(descending[last + 1])
    middle = (lower + upper) / 2
    return middle if middle < upper else lower


def _balanced_accuracy(accepted: npt.NDArray[np.bool_], same: npt.NDArray[np.bool_]) -> float:
    return float(np.mean(accepted[same]) + np.mean(~accepted[~same])) / 2
