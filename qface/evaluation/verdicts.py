"""Pairs of faces on which two models disagree, each at its own threshold."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qface.evaluation.pair_scores import Scores

__all__ = ["VerdictChange", "VerdictChanges", "Verifier", "verdict_changes"]

_ROWS = 1024


@dataclass(frozen=True)
class Verifier:
    """Embeddings and threshold of one model.

    Args:
        embeddings: float32 [images, dimensions], L2-normalized.
        threshold: cosine above which a pair is accepted.
    """

    embeddings: Scores
    threshold: float


@dataclass(frozen=True)
class VerdictChange:
    """Pair that only one of two models accepts.

    Args:
        first: index of the first image.
        second: index of the second image.
        same: True for a genuine pair.
        before: cosine by the first model.
        after: cosine by the second model.
        accepted: True if the second model accepts the pair.
    """

    first: int
    second: int
    same: bool
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class VerdictChanges:
    """Changed verdicts: their numbers and the largest changes.

    Args:
        counts: number of changes by (genuine pair, accepted by the second model).
        largest: changes of each of these four kinds with the largest change of the distance to the threshold.
    """

    counts: dict[tuple[bool, bool], int]
    largest: tuple[VerdictChange, ...]


def verdict_changes(before: Verifier, after: Verifier, labels: npt.ArrayLike, each: int = 3) -> VerdictChanges:
    """Find the pairs i < j of images that only one of two models accepts.

    Args:
        before: the first model.
        after: the second model, on the same images.
        labels: [images], identity labels.
        each: number of changes to return per kind.

    Example:
        >>> faces = np.eye(2, dtype=np.float32)
        >>> verdict_changes(Verifier(faces, 0.5), Verifier(faces, -0.5), [0, 1]).counts[False, True]
        1
    """
    people = np.asarray(labels)
    counts = {(same, accepted): 0 for same in (True, False) for accepted in (False, True)}
    largest: dict[tuple[bool, bool], list[tuple[float, VerdictChange]]] = {kind: [] for kind in counts}
    for start in range(0, len(people), _ROWS):
        margins = [_margins(judge, start) for judge in (before, after)]
        rows, columns = np.nonzero((margins[0] > 0) != (margins[1] > 0))
        upper = rows + start < columns
        for row, column in zip(rows[upper], columns[upper], strict=True):
            old, new = float(margins[0][row, column]), float(margins[1][row, column])
            kind = bool(people[row + start] == people[column]), new > 0
            counts[kind] += 1
            cosines = old + before.threshold, new + after.threshold
            change = VerdictChange(int(row) + start, int(column), kind[0], *cosines, kind[1])
            largest[kind] = heapq.nlargest(each, [*largest[kind], (abs(new - old), change)], key=_order)
    return VerdictChanges(counts, tuple(change for kind in counts for _, change in largest[kind]))


def _margins(judge: Verifier, start: int) -> Scores:
    margins: Scores = judge.embeddings[start : start + _ROWS] @ judge.embeddings.T - np.float32(judge.threshold)
    return margins


def _order(found: tuple[float, VerdictChange]) -> tuple[float, int, int]:
    return found[0], -found[1].first, -found[1].second
