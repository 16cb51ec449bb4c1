"""LFW split by identity into a tuning half and an evaluation half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.data import ImageFolder, read_lfw_pairs, resolve_pairs
from qface.evaluation import ten_fold_accuracy, tpr_at_fpr
from qface.files import temporary_folder

FPRS = ("1e-3", "1e-4", "1e-5")

Embeddings = npt.NDArray[np.float32]


class Halves:
    """Both halves of LFW, from ``lfw`` and ``lfw_pairs.txt`` in the folder ``faces``.

    Args:
        faces: the folder.
        every: keep only each ``every``-th identity of the second half.

    Attributes:
        tuning: images of the first half of the identities.
        held_out: images of the second half.
    """

    def __init__(self, faces: Path, every: int = 1) -> None:
        self.tuning = ImageFolder(faces / "lfw", identities="first-half")
        self.held_out = _each(every, ImageFolder(faces / "lfw", identities="second-half"))
        self._pairs = resolve_pairs(read_lfw_pairs(faces / "lfw_pairs.txt"), self.held_out)

    def names(self) -> str:
        """Return all image names and the number of evaluated pairs as text, one per line."""
        images = [
            path.relative_to(half.root).as_posix() for half in (self.tuning, self.held_out) for path in half.paths
        ]
        return "\n".join([*images, str(len(self._pairs))])

    def figures(self, embeddings: Embeddings, teacher: Embeddings) -> dict[str, Any]:
        """Measure verification on the second half, as fractions in [0, 1].

        Args:
            embeddings: L2-normalized embeddings of ``held_out``, ``[N, D]``.
            teacher: embeddings of the float network for the same images, ``[N, D]``.

        Returns:
            ``tpr`` and ``thresholds`` at each of :data:`FPRS`; ``gallery_tpr`` with the teacher's
            embeddings as gallery; 10-fold ``accuracy``; ``distance``, the mean of 1 - cosine to the teacher. A TPR or
            threshold is None if there are too few pairs.
        """
        assert self.held_out.labels is not None
        labels = self.held_out.labels.numpy()
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


def _each(every: int, folder: ImageFolder) -> ImageFolder:
    """Return ``folder`` with each ``every``-th of its identities."""
    if every == 1:
        return folder
    with temporary_folder() as temporary:
        names = temporary / "identities.txt"
        names.write_text("\n".join(folder.names[::every]), encoding="utf-8")
        return ImageFolder(folder.root, identities=names)
