"""Verification of degraded faces: misaligned, rotated, small, dark or occluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qface.checks import check_whole
from qface.data.images import Images, IndexedImages, Labels, labels_of
from qface.data.pairs import ResolvedPairs
from qface.data.sources import as_image_source
from qface.data.stress import STRESS_CONDITIONS, StressedImages
from qface.errors import ConfigError, ImagesError
from qface.evaluation.bootstrap import TprDrop, bootstrap_tpr_drop
from qface.evaluation.embedding import Embeddings, Model, as_embedder
from qface.evaluation.evaluate import listed_cosines, listed_pairs
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.verification import ten_fold_accuracy, tpr_at_fpr, usable_folds
from qface.parallel import processes_for
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["STRESS_FPRS", "StressFigures", "StressResult", "evaluate_stress"]

STRESS_FPRS = ("1e-3", "1e-4", "1e-5")


@dataclass(frozen=True)
class StressFigures:
    """Verification metrics under one condition; rates are fractions 0..1.

    Args:
        condition: name of the condition, ``"none"`` for unchanged images.
        tpr_at_fpr: TPR of the model at each FPR, at the threshold of this condition; None if there are too few pairs.
        accuracy: accuracy of the model over the folds of the pair list; None without one.
        cosine: mean cosine between the embeddings of model and reference; None without a reference, or if their
            embedding dimensions differ.
        reference_tpr_at_fpr: TPR of the reference at each FPR; empty without one.
        reference_accuracy: accuracy of the reference; None without reference or pair list.
        drops: TPR of the reference minus TPR of the model, with confidence over identities; empty without bootstrap.
    """

    condition: str
    tpr_at_fpr: dict[str, float | None]
    accuracy: float | None
    cosine: float | None
    reference_tpr_at_fpr: dict[str, float | None]
    reference_accuracy: float | None
    drops: dict[str, TprDrop | None]


@dataclass(frozen=True, repr=False)
class StressResult(Result):
    """Result of :func:`evaluate_stress`.

    Args:
        figures: metrics of each condition, unchanged images first.
        images: number of images per condition.
        identities: number of identities.
        seed: random seed of the degradations.
        bootstrap: number of bootstrap replicates; 0 for no intervals.

    Example:
        >>> qface.evaluate_stress("student.onnx", "faces/", conditions=["dark"]).images
        72
    """

    figures: tuple[StressFigures, ...]
    images: int
    identities: int
    seed: int
    bootstrap: int

    def _key_figures(self) -> Mapping[str, object]:
        return {"images": self.images, "conditions": [each.condition for each in self.figures]}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate_stress(
    model: Model,
    images: Images,
    pairs: str | Path | None = None,
    identities: str | Path | None = None,
    reference: Model | None = None,
    conditions: Sequence[str] = tuple(STRESS_CONDITIONS),
    seed: int = 0,
    bootstrap: int = 0,
    batch_size: int = 64,
    run_dir: str | Path | None = None,
    progress: bool = False,
) -> StressResult:
    """Measure verification of degraded probes against an unchanged gallery, under each condition.

    The same model embeds probes and gallery. All ordered pairs of two different images are compared, and the listed
    pairs, with the first image as the probe. Does not change ``model`` or ``reference``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: labeled 112x112 crops: a folder with one subfolder per identity, or a uint8 source.
        pairs: pair list (:func:`qface.data.read_pairs`) of a folder.
        identities: identities to use from a folder; None uses all.
        reference: another model to compare with, such as the float network.
        conditions: keys of :data:`qface.data.stress.STRESS_CONDITIONS`.
        seed: random seed of the degradations and the bootstrap.
        bootstrap: number of replicates over identities for the TPR drop from ``reference``; 0 computes none.
        batch_size: images per forward pass.
        run_dir: folder for embeddings, from which an interrupted call resumes. None saves nothing.
        progress: show progress on stderr.

    Returns:
        Metrics of the unchanged images and of each condition.

    Raises:
        ConfigError: a condition is unknown, a setting is out of range, ``bootstrap`` is given without a reference, or
            ``run_dir`` holds data of other models or images.
        ImagesError: the images cannot be read, are not uint8, or are unlabeled.
        PairsError: the pair list is malformed or does not match the folder.
        CheckpointError: a model file cannot be read.
        QFaceError: an embedding is not finite.

    Example:
        >>> found = qface.evaluate_stress("student.onnx", "faces/", reference="teacher.onnx", conditions=["dark"])
        >>> [each.condition for each in found.figures]
        ['none', 'dark']
    """
    check_whole(0, bootstrap=bootstrap)
    if bootstrap and reference is None:
        raise ConfigError("bootstrap needs a reference to compare with: pass reference, or leave bootstrap out")
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None or not isinstance(source, IndexedImages):
        raise ImagesError("a stress test needs labeled images: pass a folder with one subfolder per identity")
    shown = {"none": source, **{name: StressedImages(source, name, seed) for name in conditions}}
    listed = None if pairs is None else listed_pairs(pairs, source)
    if listed is not None:
        usable_folds(listed.same, listed.fold)  # raises before the slow embedding
    judge = _Judge(labels, listed, bootstrap, seed)
    models = {"model": as_embedder(model)} | ({} if reference is None else {"reference": as_embedder(reference)})
    parallel = processes_for(None)

    def embedded(name: str, condition: str) -> Embeddings:
        folder = None if run_dir is None else Path(run_dir) / name / condition
        return embed_shared(models[name], shown[condition], parallel, folder, batch_size)

    plain = {name: embedded(name, "none") for name in models}
    figures = []
    for condition in shown:
        probes = plain if condition == "none" else {name: embedded(name, condition) for name in models}
        figures.append(judge.figures(condition, [_ModelEmbeddings(probes[name], plain[name]) for name in models]))
    return StressResult(tuple(figures), len(source), len(np.unique(labels)), seed, bootstrap)


@dataclass(frozen=True)
class _ModelEmbeddings:
    """Embeddings of degraded and unchanged faces by one model."""

    probes: Embeddings
    gallery: Embeddings

    def tprs(self, labels: Labels) -> dict[str, float | None]:
        points = tpr_at_fpr(self.probes, labels, STRESS_FPRS, self.gallery)
        return {fpr: point.tpr for fpr, point in points.items()}

    def accuracy(self, listed: ResolvedPairs | None) -> float | None:
        if listed is None:
            return None
        return ten_fold_accuracy(listed_cosines(listed, self.probes, self.gallery), listed.same, listed.fold)[0]


@dataclass(frozen=True)
class _Judge:
    """Metrics for fixed labels, pairs and bootstrap settings."""

    labels: Labels
    listed: ResolvedPairs | None
    bootstrap: int
    seed: int

    def figures(self, condition: str, seen: Sequence[_ModelEmbeddings]) -> StressFigures:
        """Compute the metrics of the model, first in ``seen``, and of the optional reference."""
        model, *others = seen
        reference = others[0] if others else None
        return StressFigures(
            condition=condition,
            tpr_at_fpr=model.tprs(self.labels),
            accuracy=model.accuracy(self.listed),
            cosine=None if reference is None else _mean_cosine(model, reference),
            reference_tpr_at_fpr={} if reference is None else reference.tprs(self.labels),
            reference_accuracy=None if reference is None else reference.accuracy(self.listed),
            drops={} if reference is None or not self.bootstrap else self._drops(model, reference),
        )

    def _drops(self, model: _ModelEmbeddings, reference: _ModelEmbeddings) -> dict[str, TprDrop | None]:
        return bootstrap_tpr_drop(
            reference.probes,
            model.probes,
            self.labels,
            STRESS_FPRS,
            self.bootstrap,
            self.seed,
            gallery=model.gallery,
            reference_gallery=reference.gallery,
        )


def _mean_cosine(model: _ModelEmbeddings, reference: _ModelEmbeddings) -> float | None:
    """Return the mean cosine between both models; None if their embedding dimensions differ."""
    if model.probes.shape != reference.probes.shape:
        return None
    return float(np.mean(np.sum(model.probes * reference.probes, axis=1, dtype=np.float64)))
