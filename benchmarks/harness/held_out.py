"""LFW in two halves: the people that everything is tuned on, and those that it is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.data import ImageFolder, read_lfw_pairs, resolve_pairs
from qface.evaluation import ten_fold_accuracy, tpr_at_fpr

FPRS = ("1e-3", "1e-4", "1e-5")

Embeddings = npt.NDArray[np.float32]


class Halves:
    """``lfw`` and ``lfw_pairs.txt`` of a folder.

    Attributes:
        tuning: images of the first half of the people.
        judging: images of the second half.
    """

    def __init__(self, faces: Path) -> None:
        self.tuning = ImageFolder(faces / "lfw", identities="first-half")
        self.judging = ImageFolder(faces / "lfw", identities="second-half")
        self._pairs = resolve_pairs(read_lfw_pairs(faces / "lfw_pairs.txt"), self.judging)

    def names(self) -> str:
        """All images by name, and how many of the pairs are judged."""
        images = [path.relative_to(half.root).as_posix() for half in (self.tuning, self.judging) for path in half.paths]
        return "\n".join([*images, str(len(self._pairs))])

    def figures(self, embeddings: Embeddings, teacher: Embeddings) -> dict[str, Any]:
        """Verification of the second half, as shares.

        Args:
            embeddings: [images, dimensions] of ``judging``, L2-normalized.
            teacher: the same of the float network.

        Returns:
            ``tpr`` and ``thresholds`` at each of :data:`FPRS`, ``gallery_tpr`` where the teacher enrolled the gallery,
            ``accuracy`` over the ten folds, and ``distance``, the mean of 1 - cosine to the teacher. None where there
            are too few pairs.
        """
        assert self.judging.labels is not None
        labels = self.judging.labels.numpy()
        own = tpr_at_fpr(embeddings, labels, FPRS)
        mixed = tpr_at_fpr(embeddings, labels, FPRS, gallery=teacher)
        return {
            "tpr": {fpr: point.tpr for fpr, point in own.items()},
            "thresholds": {fpr: point.threshold for fpr, point in own.items()},
            "gallery_tpr": {fpr: point.tpr for fpr, point in mixed.items()},
            "accuracy": self._accuracy(embeddings),
            "distance": float(1 - np.mean(np.sum(embeddings * teacher, axis=1))),
        }

    def _accuracy(self, embeddings: Embeddings) -> float:
        pairs = self._pairs
        cosines = np.sum(embeddings[pairs.first] * embeddings[pairs.second], axis=1)
        return ten_fold_accuracy(cosines, pairs.same, pairs.fold)[0]
