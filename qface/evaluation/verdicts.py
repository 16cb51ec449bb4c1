"""Pairs of faces that two models judge differently, each at its own threshold."""

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
    """The embeddings of one model, and the cosine above which it accepts a pair.

    Args:
        embeddings: float32 [images, dimensions], L2-normalized.
        threshold: a cosine.
    """

    embeddings: Scores
    threshold: float


@dataclass(frozen=True)
class VerdictChange:
    """A pair that one of two models accepts.

    Args:
        first: number of the first image.
        second: number of the second image.
        same: True if both show one person.
        before: cosine of the first model.
        after: cosine of the second model.
        accepted: True if the second model accepts it.
    """

    first: int
    second: int
    same: bool
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class VerdictChanges:
    """All changes, counted, and the largest of them.

    Args:
        counts: by (same person, accepted now).
        largest: of each of the four kinds, those whose distance to the threshold changed most.
    """

    counts: dict[tuple[bool, bool], int]
    largest: tuple[VerdictChange, ...]


def verdict_changes(before: Verifier, after: Verifier, labels: npt.ArrayLike, each: int = 3) -> VerdictChanges:
    """Find the pairs i < j of images that ``after`` accepts and ``before`` does not, or the other way round.

    Args:
        before: the first model.
        after: the second model, on the same images.
        labels: [images], the identities.
        each: changes to return of each kind.

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
