"""Evaluation of trials: the TPR that a file loses against the float network, on people who were not tuned on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qface.compression.compress_config import CompressionTarget
from qface.data.folders import ImageFolder
from qface.data.images import IndexedImages, labels_of
from qface.data.stress import StressedImages
from qface.errors import ConfigError, ImagesError
from qface.evaluation.bootstrap import TprDrop, bootstrap_tpr_drop
from qface.evaluation.embedding import Embeddings, as_embedder, embed
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.verification import count_pairs, finest_rate, impostors_needed, ranks_of, tpr_at_fpr
from qface.parallel import processes_for

__all__ = ["Drops", "Judge"]


@dataclass(frozen=True)
class Drops:
    """TPR that a file loses, as fractions.

    Args:
        plain: drop on unchanged images.
        stress: drop under each evaluated condition.
    """

    plain: TprDrop
    stress: dict[str, TprDrop]

    @property
    def largest_bound(self) -> float:
        """Maximum upper confidence bound of these drops."""
        return max(drop.upper for drop in (self.plain, *self.stress.values()))


class Judge:
    """Compare ONNX files with the float network on one set of people.

    Args:
        teacher: the float network.
        faces: folder with one subfolder per person.
        target: its ``max_drop``, ``stress``, ``at_fpr`` and ``confidence`` are used.
        folder: cache of the teacher's embeddings, for runs that continue.

    Attributes:
        faces: the folder.
        tpr: TPR of the float network, 0..1.

    Raises:
        ConfigError: the people have too few impostor pairs for the FPR.
        ImagesError: the images have no labels, cannot be read, or have no genuine or no impostor pairs.
    """

    def __init__(self, teacher: nn.Module, faces: ImageFolder, target: CompressionTarget, folder: Path) -> None:
        labels = labels_of(faces)
        if labels is None:
            raise ImagesError(f"{faces.root} does not say who is who: give a folder with one subfolder per person")
        _check_rate(target.at_fpr, count_pairs(labels)[1])
        self.faces, self._labels, self._target = faces, labels, target
        self._teacher, self._folder = as_embedder(teacher), folder
        self._stressed: dict[str, Embeddings] = {}  # the teacher's, by condition
        self._reference = self._reference_of(faces, folder)
        tpr = tpr_at_fpr(self._reference, labels, [target.at_fpr])[target.at_fpr].tpr
        assert tpr is not None  # the rate was checked
        self.tpr = tpr

    def __call__(self, file: Path) -> Drops:
        """Return the TPR that an ONNX file loses, with its confidence interval, also under stress.

        A condition is evaluated only if the unchanged images and all conditions before it meet ``max_drop``.

        Args:
            file: the file.

        Raises:
            CheckpointError: the file cannot be read.
            QFaceError: an embedding is not finite.
        """
        embedder = as_embedder(file)
        gallery = embed(embedder, self.faces)
        found = Drops(self._drop(self._reference, gallery), {})
        for condition in self._target.stress:
            if found.largest_bound > self._max_drop:
                break
            images = StressedImages(self.faces, condition)
            if condition not in self._stressed:
                self._stressed[condition] = self._reference_of(images, self._folder / condition)
            found.stress[condition] = self._drop(self._stressed[condition], embed(embedder, images), gallery)
        return found

    @property
    def _max_drop(self) -> float:
        assert self._target.max_drop is not None  # checked by the target if there are stress conditions
        return self._target.max_drop / 100

    def _reference_of(self, images: IndexedImages, folder: Path) -> Embeddings:
        return embed_shared(self._teacher, images, processes_for(None), folder)

    def _drop(self, reference: Embeddings, probes: Embeddings, gallery: Embeddings | None = None) -> TprDrop:
        """Return the drop from ``reference`` to ``probes``; a gallery means that the probes are degraded."""
        rate = self._target.at_fpr
        drop = bootstrap_tpr_drop(
            reference,
            probes,
            self._labels,
            [rate],
            confidence=self._target.confidence,
            gallery=gallery,
            reference_gallery=None if gallery is None else self._reference,
        )[rate]
        assert drop is not None  # the rate was checked
        return drop


def _check_rate(fpr: str, impostors: int) -> None:
    if ranks_of([fpr], impostors)[fpr] is not None:
        return
    advice = finest_rate(impostors)
    raise ConfigError(
        f"FPR {fpr} needs {impostors_needed(fpr):,} impostor pairs, and the people to evaluate on have {impostors:,}: "
        + ("give more people" if advice is None else f"give more people, or use the FPR {advice} (at_fpr, --at-fpr)")
    )
