"""Histograms of the cosines of genuine and impostor pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qface.evaluation.pair_scores import PairScores, Scores

__all__ = ["ScoreHistogram", "score_histogram"]


@dataclass(frozen=True)
class ScoreHistogram:
    """Distribution of genuine and impostor pairs over cosine bins.

    Args:
        edges: bin edges, [bins + 1].
        genuine: fraction of the genuine pairs in each bin.
        impostors: fraction of the impostor pairs in each bin.
    """

    edges: tuple[float, ...]
    genuine: tuple[float, ...]
    impostors: tuple[float, ...]


def score_histogram(probes: Scores, labels: npt.ArrayLike, bins: int = 80) -> ScoreHistogram:
    """Count the cosines of all pairs i < j of images in equal bins from -1 to 1.

    Args:
        probes: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        bins: number of bins.

    Raises:
        QFaceError: the embeddings do not match the labels, or are not finite.

    Example:
        >>> score_histogram(np.eye(3, dtype=np.float32), [0, 0, 1], bins=2).genuine
        (0.0, 1.0)
    """
    scores = PairScores(probes, labels)
    edges = np.linspace(-1, 1, bins + 1)
    counts = np.zeros((2, bins), np.int64)
    for tile in scores.tiles():
        for kind, found in enumerate(scores.of(tile)):
            counts[kind] += np.histogram(np.clip(found, -1, 1), bins, (-1, 1))[0]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return ScoreHistogram(tuple(edges.tolist()), tuple(shares[0].tolist()), tuple(shares[1].tolist()))
