"""Face verification on labeled images and pair lists."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qface.checks import check_whole
from qface.data.folders import ImageFolder
from qface.data.images import Images, ImageSource, Labels, labels_of
from qface.data.pairs import PairedImages, ResolvedPairs, read_pairs, resolve_pairs
from qface.data.sources import as_image_source
from qface.errors import ImagesError, PairsError
from qface.evaluation.bootstrap import Interval, PairIntervals, bootstrap_eer, bootstrap_pairs, bootstrap_tpr
from qface.evaluation.embedding import Embedder, Embeddings, Model, as_embedder
from qface.evaluation.pair_scores import Scores
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.verification import (
    FPRS,
    OperatingPoint,
    count_pairs,
    equal_error_rate,
    equal_error_rate_of_scores,
    single_fold_accuracy,
    ten_fold_accuracy,
    tpr_at_fpr,
    tpr_at_fpr_of_scores,
    usable_folds,
)
from qface.parallel import processes_for
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["EvaluationResult", "ListedFigures", "evaluate", "listed_cosines", "listed_pairs"]

_LOGGER = logging.getLogger("qface")


@dataclass(frozen=True)
class ListedFigures:
    """Error rates over the pairs of a list, as fractions 0..1.

    Args:
        genuine_pairs: number of genuine pairs used.
        impostor_pairs: number of impostor pairs used.
        eer: equal error rate.
        tpr_at_fpr: true-positive rate at each false-positive rate; None if there are too few impostor pairs.
        thresholds: cosine above which a pair is accepted, at the same rates.
        accuracy_interval: confidence interval of the accuracy; None without bootstrap.
        eer_interval: confidence interval of ``eer``, likewise.
        tpr_intervals: confidence intervals of ``tpr_at_fpr``; empty without bootstrap.
        resampled: unit of the bootstrap: ``"people"``, or ``"pairs"`` for unlabeled images; None without bootstrap.
    """

    genuine_pairs: int
    impostor_pairs: int
    eer: float
    tpr_at_fpr: dict[str, float | None]
    thresholds: dict[str, float | None]
    accuracy_interval: Interval | None
    eer_interval: Interval | None
    tpr_intervals: dict[str, Interval | None]
    resampled: str | None


@dataclass(frozen=True, repr=False)
class EvaluationResult(Result):
    """Result of :func:`evaluate`; rates are fractions 0..1.

    Args:
        accuracy: mean accuracy over the folds of the pair list; for a list of one fold, the accuracy at the threshold
            that is best on the same pairs; None without pairs.
        accuracy_std: standard deviation over the folds; None for one fold.
        tpr_at_fpr: true-positive rate at each false-positive rate over all pairs of images; None if there are too few
            impostor pairs.
        thresholds: cosine above which a pair is accepted, at the same rates.
        images: number of images embedded.
        identities: number of identities; 0 for unlabeled images.
        pairs: number of listed pairs used.
        pairs_dropped: number of listed pairs left out, because an identity is not selected.
        genuine_pairs: number of genuine pairs among all pairs of images; among listed pairs if images are unlabeled.
        impostor_pairs: number of impostor pairs, likewise.
        runtime: runtime of the model, such as ``"torch cpu"``.
        seconds: time to read and embed all images, gallery included.
        preprocessing: preprocessing of the model and its source, in words.
        gallery_preprocessing: preprocessing of the gallery model; None without one.
        eer: equal error rate over all pairs of images (:func:`qface.evaluation.equal_error_rate`); None for unlabeled
            images.
        bootstrap: number of bootstrap replicates; 0 for no intervals.
        tpr_intervals: 95 % confidence intervals of ``tpr_at_fpr`` by bootstrap over identities; empty without.
        eer_interval: 95 % confidence interval of ``eer``, likewise; None without bootstrap, or if more than about 10
            million impostor pairs are accepted.
        listed: error rates over the pair list; None without one.

    Example:
        >>> qface.evaluate("student.onnx", "faces/").identities
        12
    """

    accuracy: float | None
    accuracy_std: float | None
    tpr_at_fpr: dict[str, float | None]
    thresholds: dict[str, float | None]
    images: int
    identities: int
    pairs: int
    pairs_dropped: int
    genuine_pairs: int
    impostor_pairs: int
    runtime: str
    seconds: float
    preprocessing: str = ""
    gallery_preprocessing: str | None = None
    eer: float | None = None
    bootstrap: int = 0
    tpr_intervals: dict[str, Interval | None] = field(default_factory=dict)
    eer_interval: Interval | None = None
    listed: ListedFigures | None = None

    def _key_figures(self) -> Mapping[str, object]:
        return {"images": self.images, "accuracy": self.accuracy, "tpr_at_fpr": self.tpr_at_fpr}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate(
    model: Model,
    images: Images,
    pairs: str | Path | None = None,
    identities: str | Path | None = None,
    gallery: Model | None = None,
    flip: bool = False,
    batch_size: int = 64,
    run_dir: str | Path | None = None,
    progress: bool = False,
    bootstrap: int = 0,
) -> EvaluationResult:
    """Measure face verification (TPR at FPR) over all pairs of images and over a pair list.

    Under ``torchrun`` the processes share images and pairs, and all return the same result. Does not change ``model``
    or ``gallery``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder per identity, or other labeled images. For the accuracy
            only: a flat folder with ``pairs``, a ``.bin`` file of InsightFace, or a split of CFP.
        pairs: pair list (:func:`qface.data.read_pairs`) of a folder.
        identities: identities to use from a folder; see :func:`qface.data.identities.select_identities`.
        gallery: another model to embed the gallery, while ``model`` embeds the probes (the first image of a listed
            pair). None: ``model`` embeds both.
        flip: add the embedding of the mirrored image before normalization.
        batch_size: images per forward pass.
        run_dir: folder for embeddings and pair counts, from which an interrupted call resumes. None saves nothing.
        progress: show progress on stderr.
        bootstrap: number of replicates over identities for 95 % confidence intervals
            (:mod:`qface.evaluation.bootstrap`); 200 suffice, 0 computes none.

    Returns:
        Accuracy, error rates and thresholds, with the number of images and pairs.

    Raises:
        ConfigError: ``run_dir`` holds data of another model or other images, or ``bootstrap`` is negative.
        DependencyError: several processes without Lightning Fabric.
        ExportError: ``run_dir`` is not writable.
        ImagesError: the images cannot be read, are unlabeled without pairs, or form no genuine or no impostor pairs.
        PairsError: the pair list is malformed, has fewer than two usable folds, or does not match the folder.
        CheckpointError: a model file cannot be read.
        QFaceError: an embedding is not finite, or the two models have different embedding dimensions.

    Example:
        >>> result = qface.evaluate("student.onnx", "faces/", identities="second-half")
        >>> result.images, result.genuine_pairs, result.impostor_pairs
        (36, 90, 540)
    """
    check_whole(0, bootstrap=bootstrap)
    source = as_image_source(images, identities)
    listed = listed_pairs(pairs, source)
    labels = _labels(source, needed=listed is None)
    genuine, impostors = _counts(labels, listed, ordered=gallery is not None)
    if listed is not None:
        _check_folds(listed)  # before the slow embedding
    prober = as_embedder(model)
    galleries = None if gallery is None else as_embedder(gallery)
    folder = None if run_dir is None else Path(run_dir)
    parallel = processes_for(None)

    def embedded(embedder: Embedder, name: str) -> Embeddings:
        kept = None if folder is None else folder / name
        return embed_shared(embedder, source, parallel, kept, batch_size, flip)

    start = time.perf_counter()
    probes = embedded(prober, "probes")
    mates = None if galleries is None else embedded(galleries, "gallery")
    seconds = time.perf_counter() - start

    points = _points(probes, labels, mates, folder)
    cosines = None if listed is None else listed_cosines(listed, probes, probes if mates is None else mates)
    accuracy, deviation = _accuracy(listed, cosines)
    eer = None if labels is None else equal_error_rate(probes, labels, mates)
    tpr_intervals, eer_interval = _intervals(probes, labels, mates, eer, bootstrap)
    return EvaluationResult(
        accuracy=accuracy,
        accuracy_std=deviation,
        tpr_at_fpr={fpr: point.tpr for fpr, point in points.items()},
        thresholds={fpr: point.threshold for fpr, point in points.items()},
        images=len(probes),
        identities=0 if labels is None else len(np.unique(labels)),
        pairs=0 if listed is None else len(listed),
        pairs_dropped=0 if listed is None else listed.dropped,
        genuine_pairs=genuine,
        impostor_pairs=impostors,
        runtime=str(getattr(prober, "runtime", type(prober).__name__)),
        seconds=seconds,
        preprocessing=prober.preprocessing.describe(),
        gallery_preprocessing=None if galleries is None else galleries.preprocessing.describe(),
        eer=eer,
        bootstrap=bootstrap,
        tpr_intervals=tpr_intervals,
        eer_interval=eer_interval,
        listed=_listed_figures(listed, cosines, labels, bootstrap),
    )


def _labels(source: ImageSource, needed: bool) -> Labels | None:
    labels = labels_of(source)
    if labels is None and needed:
        raise ImagesError("evaluation needs labeled images: pass a folder with one subfolder per identity, or pairs")
    return labels


def listed_pairs(pairs: str | Path | None, source: ImageSource) -> ResolvedPairs | None:
    """Return the listed pairs as image indices.

    Args:
        pairs: path of a pair list, or None.
        source: the images, which may contain their own pairs.

    Returns:
        The pairs of the list or of ``source``; None without either.

    Raises:
        PairsError: the list is malformed, does not match the images, or is given for images with their own pairs.
    """
    if isinstance(source, PairedImages):
        if pairs is not None:
            raise PairsError(f"{source.path} contains its own pairs: leave out {pairs}")
        return source.pairs
    if pairs is None:
        return None
    if not isinstance(source, ImageFolder):
        raise PairsError(f"the pairs in {pairs} are file names: pass the folder of these files as images")
    return resolve_pairs(read_pairs(pairs), source)


def _counts(labels: Labels | None, listed: ResolvedPairs | None, ordered: bool) -> tuple[int, int]:
    """Count genuine and impostor pairs, by labels if there are any, else in the list."""
    if labels is not None:
        return count_pairs(labels, ordered)
    assert listed is not None
    genuine = int(np.count_nonzero(listed.same))
    return genuine, len(listed) - genuine


def _points(
    probes: Embeddings, labels: Labels | None, mates: Embeddings | None, folder: Path | None
) -> dict[str, OperatingPoint]:
    if labels is None:
        return {fpr: OperatingPoint(None, None) for fpr in FPRS}
    return tpr_at_fpr(probes, labels, gallery=mates, run_dir=folder)


def _intervals(
    probes: Embeddings, labels: Labels | None, mates: Embeddings | None, eer: float | None, bootstrap: int
) -> tuple[dict[str, Interval | None], Interval | None]:
    """Return the confidence intervals of TPR at FPR and of the equal error rate; empty and None without bootstrap."""
    if not bootstrap or labels is None or eer is None:
        return {}, None
    tprs = bootstrap_tpr(probes, labels, FPRS, mates, bootstrap)
    return tprs, bootstrap_eer(eer, probes, labels, mates, bootstrap)


def listed_cosines(pairs: ResolvedPairs, probes: Embeddings, mates: Embeddings) -> Scores:
    """Compute the cosines of listed pairs, float32 [pairs].

    Args:
        pairs: pairs of image indices.
        probes: embeddings of the first images, float32 [images, dimensions], L2-normalized.
        mates: embeddings of the second images, likewise.
    """
    cosines: Scores = np.sum(probes[pairs.first] * mates[pairs.second], axis=1)
    return cosines


def _accuracy(pairs: ResolvedPairs | None, cosines: Scores | None) -> tuple[float | None, float | None]:
    if pairs is None or cosines is None:
        return None, None
    if _is_one_fold(pairs):
        return single_fold_accuracy(cosines, pairs.same), None
    return ten_fold_accuracy(cosines, pairs.same, pairs.fold)


def _listed_figures(
    pairs: ResolvedPairs | None, cosines: Scores | None, labels: Labels | None, bootstrap: int
) -> ListedFigures | None:
    if pairs is None or cosines is None:
        return None
    points = tpr_at_fpr_of_scores(cosines, pairs.same)
    people = None if labels is None else (labels[pairs.first], labels[pairs.second])
    intervals = PairIntervals(None, None, {})
    if bootstrap:
        intervals = bootstrap_pairs(cosines, pairs.same, pairs.fold, people, replicates=bootstrap)
    genuine = int(np.count_nonzero(pairs.same))
    return ListedFigures(
        genuine_pairs=genuine,
        impostor_pairs=len(pairs) - genuine,
        eer=equal_error_rate_of_scores(cosines, pairs.same),
        tpr_at_fpr={fpr: point.tpr for fpr, point in points.items()},
        thresholds={fpr: point.threshold for fpr, point in points.items()},
        accuracy_interval=intervals.accuracy,
        eer_interval=intervals.eer,
        tpr_intervals=intervals.tpr_at_fpr,
        resampled=None if not bootstrap else "pairs" if people is None else "people",
    )


def _is_one_fold(pairs: ResolvedPairs) -> bool:
    return len(np.unique(pairs.fold)) == 1 and pairs.dropped == 0


def _check_folds(pairs: ResolvedPairs) -> None:
    """Raise if the pairs have too few folds for an accuracy; warn about a single fold."""
    if not _is_one_fold(pairs):
        usable_folds(pairs.same, pairs.fold)
        return
    if len(np.unique(pairs.same)) < 2:
        raise PairsError("the pair list needs both genuine and impostor pairs: restore the list")
    _LOGGER.warning(
        "the %d pairs form one fold: the accuracy uses the best threshold on the same pairs and so exceeds a ten-fold "
        "accuracy",
        len(pairs),
    )
