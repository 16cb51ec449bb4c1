"""The verb ``evaluate``: verification figures of a model on a folder of labeled faces."""

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
from qface.evaluation.bootstrap import Interval, PairIntervals, bootstrap_pairs, bootstrap_tpr
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
    """Error rates over the pairs of a list; shares are fractions, 0..1.

    Args:
        genuine_pairs: listed pairs of one person that were used.
        impostor_pairs: listed pairs of two people that were used.
        eer: equal error rate.
        tpr_at_fpr: true-positive rate at each false-positive rate; None where there are too few impostor pairs.
        thresholds: the cosine above which a pair is accepted, for the same rates.
        accuracy_interval: confidence interval of the accuracy; None without replicates.
        tpr_intervals: confidence intervals of ``tpr_at_fpr``; empty without replicates.
        resampled: ``"people"``, or ``"pairs"`` where it is not known who is who; None without replicates.
    """

    genuine_pairs: int
    impostor_pairs: int
    eer: float
    tpr_at_fpr: dict[str, float | None]
    thresholds: dict[str, float | None]
    accuracy_interval: Interval | None
    tpr_intervals: dict[str, Interval | None]
    resampled: str | None


@dataclass(frozen=True, repr=False)
class EvaluationResult(Result):
    """The result of :func:`evaluate`; shares are fractions, 0..1.

    Args:
        accuracy: mean over the folds of the pair list; of a list of one fold, at the threshold that is best on its own
            pairs; None without pairs.
        accuracy_std: its standard deviation over the folds; None of a list of one fold.
        tpr_at_fpr: true-positive rate at each false-positive rate over all pairs of images; None where there
            are too few impostor pairs to measure it.
        thresholds: the cosine above which a pair is accepted, for the same rates.
        images: images embedded.
        identities: people among them; 0 where only pairs are known.
        pairs: pairs of the list that were used.
        pairs_dropped: pairs of the list left out, because somebody in them is not selected.
        genuine_pairs: pairs of images of one person, out of all pairs, or of those that are known.
        impostor_pairs: pairs of images of two people, likewise.
        runtime: what computed the embeddings, such as ``"torch cpu"``.
        seconds: time to read and embed the images, the gallery's included.
        preprocessing: what the model reads and who says so, in words.
        gallery_preprocessing: that of the gallery's model; None without one.
        eer: equal error rate over all pairs of images (:func:`qface.evaluation.equal_error_rate`); None where it is not
            known who is who.
        bootstrap: replicates that intervals come from; 0 for none.
        tpr_intervals: 95 % confidence intervals of ``tpr_at_fpr``, by bootstrap over people; empty without replicates.
        listed: error rates over the list of pairs; None without one.

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
    listed: ListedFigures | None = None

    def _key_figures(self) -> Mapping[str, object]:
        return {"images": self.images, "accuracy": self.accuracy, "tpr_at_fpr": self.tpr_at_fpr}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
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
    """Measure how well ``model`` verifies faces: over all pairs of images, and over a list of pairs.

    Under ``torchrun`` the processes share images and pairs, and all return the same. Does not change ``model`` or
    ``gallery``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder a person, or other labeled images; or, for the accuracy
            alone, a flat folder with ``pairs``, or what brings its own: a ``.bin`` file of InsightFace, a split of CFP.
        pairs: a list of pairs (:func:`qface.data.read_pairs`); it needs a folder.
        identities: which of the folder's to use; see :func:`qface.data.identities.select_identities`.
        gallery: another model that embeds the same images as the gallery, while ``model`` embeds the probes;
            of a listed pair, the first image is the probe.
        flip: add the embedding of the mirrored image before normalizing.
        batch_size: images a forward pass.
        run_dir: folder to keep embeddings and counts of pairs in; a call that was stopped goes on there. None keeps
            nothing.
        progress: show the stages on stderr.
        bootstrap: replicates for 95 % confidence intervals, over people (:mod:`qface.evaluation.bootstrap`); 200 are
            enough, 0 computes none.

    Raises:
        ConfigError: ``run_dir`` is of another model or other images, or ``bootstrap`` is below 0.
        DependencyError: several processes without Lightning Fabric.
        ExportError: ``run_dir`` cannot be written to.
        ImagesError: the images cannot be read, carry no labels, or form no genuine or no impostor pairs.
        PairsError: the list of pairs is malformed, leaves fewer than two folds, or does not fit the folder.
        CheckpointError: a model file cannot be read.
        QFaceError: a model gives no finite embeddings, or the two models' do not compare.

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
        _check_folds(listed)  # complains before the images take their time
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
    intervals = bootstrap_tpr(probes, labels, FPRS, mates, bootstrap) if bootstrap and labels is not None else {}
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
        eer=None if labels is None else equal_error_rate(probes, labels, mates),
        bootstrap=bootstrap,
        tpr_intervals=intervals,
        listed=_listed_figures(listed, cosines, labels, bootstrap),
    )


def _labels(source: ImageSource, needed: bool) -> Labels | None:
    labels = labels_of(source)
    if labels is None and needed:
        raise ImagesError("evaluation needs to know who is who: pass a folder with one subfolder a person, or pairs")
    return labels


def listed_pairs(pairs: str | Path | None, source: ImageSource) -> ResolvedPairs | None:
    """The pairs of the list ``pairs`` as numbers of images, or those that ``source`` brings; None without either.

    Raises:
        PairsError: the list is malformed, does not fit the images, or comes beside pairs of their own.
    """
    if isinstance(source, PairedImages):
        if pairs is not None:
            raise PairsError(f"{source.path} brings its own pairs: leave {pairs} out")
        return source.pairs
    if pairs is None:
        return None
    if not isinstance(source, ImageFolder):
        raise PairsError(f"the pairs of {pairs} name files: pass the folder that holds them as images")
    return resolve_pairs(read_pairs(pairs), source)


def _counts(labels: Labels | None, listed: ResolvedPairs | None, ordered: bool) -> tuple[int, int]:
    """Genuine and impostor pairs: all that labels give rise to, or those that are listed."""
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


def listed_cosines(pairs: ResolvedPairs, probes: Embeddings, mates: Embeddings) -> Scores:
    """The cosines of ``pairs``, float32 [pairs]: of each the first image is of ``probes``, the second of ``mates``.

    Args:
        pairs: numbers of images.
        probes: float32 [images, dimensions], L2-normalized.
        mates: likewise of the same images.
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
    intervals = PairIntervals(None, {})
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
        tpr_intervals=intervals.tpr_at_fpr,
        resampled=None if not bootstrap else "pairs" if people is None else "people",
    )


def _is_one_fold(pairs: ResolvedPairs) -> bool:
    return len(np.unique(pairs.fold)) == 1 and pairs.dropped == 0


def _check_folds(pairs: ResolvedPairs) -> None:
    """Complain before the images take their time of pairs that give no accuracy, and say how one fold is judged."""
    if not _is_one_fold(pairs):
        usable_folds(pairs.same, pairs.fold)
        return
    if len(np.unique(pairs.same)) < 2:
        raise PairsError("verification needs pairs of one person and pairs of two: restore the list")
    _LOGGER.warning(
        "the %d pairs are one fold: accuracy is that at the threshold which is best on these same pairs, so more than "
        "ten folds would say",
        len(pairs),
    )
