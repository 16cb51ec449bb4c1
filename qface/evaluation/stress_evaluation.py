"""The verb ``evaluate_stress``: recognition of faces that are ill aligned, turned, small, dark or covered."""

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
    """Verification figures under one condition; shares are fractions, 0..1.

    Args:
        condition: its name, ``"none"`` for the images as they are.
        tpr_at_fpr: of the model, each rate at the threshold of this condition; None where there are too few pairs.
        accuracy: of the model over the folds of the list of pairs; None without one.
        cosine: mean cosine of the embeddings of model and reference; None without a reference.
        reference_tpr_at_fpr: of the reference; empty without one.
        reference_accuracy: likewise; None without one.
        drops: TPR that the model loses against the reference, with confidence over people; empty without replicates.
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
    """The figures of all conditions, the images as they are first.

    Args:
        figures: one for each condition.
        images: images embedded under each.
        identities: people among them.
        seed: of what differs from image to image.
        bootstrap: replicates that the confidence of drops comes from; 0 for none.

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
        """Plain Python values, ready for JSON."""
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
    """Measure how well ``model`` verifies changed faces against unchanged ones, under each of ``conditions``.

    Each probe is a changed face and each gallery face is as it is, both embedded by one model: of all pairs of two
    different images, and of listed pairs, whose first image is the probe. Does not change ``model`` or ``reference``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: 112x112 crops with labels: a folder with one subfolder a person, or a uint8 source.
        pairs: a list of pairs (:func:`qface.data.read_pairs`); it needs a folder.
        identities: of a folder, which people.
        reference: another model, such as the float network, that the same faces are shown to.
        conditions: names of :data:`qface.data.stress.STRESS_CONDITIONS`.
        seed: of what differs from image to image.
        bootstrap: replicates for the confidence of what is lost against ``reference``; 0 computes none.
        batch_size: images a forward pass.
        run_dir: folder to keep embeddings in; a call that was stopped goes on there. None keeps nothing.
        progress: show the stages on stderr.

    Returns:
        The figures of the images as they are, and of each condition.

    Raises:
        ConfigError: there is no such condition, a setting is out of its range, ``bootstrap`` has no reference to
            compare with, or ``run_dir`` is of other models or images.
        ImagesError: the images cannot be read, are no bytes, or carry no labels.
        PairsError: the list of pairs is malformed or does not fit the folder.
        CheckpointError: a model file cannot be read.
        QFaceError: a model gives no finite embeddings.

    Example:
        >>> found = qface.evaluate_stress("student.onnx", "faces/", reference="teacher.onnx", conditions=["dark"])
        >>> [each.condition for each in found.figures]
        ['none', 'dark']
    """
    check_whole(0, bootstrap=bootstrap)
    if bootstrap and reference is None:
        raise ConfigError("bootstrap is for what a model loses against a reference: give one, or leave it out")
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None or not isinstance(source, IndexedImages):
        raise ImagesError("a stress test needs to know who is who: pass a folder with one subfolder a person")
    shown = {"none": source, **{name: StressedImages(source, name, seed) for name in conditions}}
    listed = None if pairs is None else listed_pairs(pairs, source)
    if listed is not None:
        usable_folds(listed.same, listed.fold)  # complains before the images take their time
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
        figures.append(judge.figures(condition, [_Seen(probes[name], plain[name]) for name in models]))
    return StressResult(tuple(figures), len(source), len(np.unique(labels)), seed, bootstrap)


@dataclass(frozen=True)
class _Seen:
    """Embeddings that one model makes of changed faces, and of the same faces as they are."""

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
    """Who is on the images, and how sure the figures are to be."""

    labels: Labels
    listed: ResolvedPairs | None
    bootstrap: int
    seed: int

    def figures(self, condition: str, seen: Sequence[_Seen]) -> StressFigures:
        """Those of the model, the first of ``seen``, beside those of a reference."""
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

    def _drops(self, model: _Seen, reference: _Seen) -> dict[str, TprDrop | None]:
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


def _mean_cosine(model: _Seen, reference: _Seen) -> float | None:
    """None where embeddings of different length do not compare."""
    if model.probes.shape != reference.probes.shape:
        return None
    return float(np.mean(np.sum(model.probes * reference.probes, axis=1, dtype=np.float64)))
