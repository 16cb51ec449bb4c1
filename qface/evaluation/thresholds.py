"""Thresholds for quantized devices that compare with the gallery of a float network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qface.data.images import Images, ImageSource, Labels, labels_of
from qface.data.sources import as_image_source
from qface.errors import ImagesError
from qface.evaluation.embedding import Embedder, Embeddings, Model, as_embedder, embed
from qface.evaluation.verification import Rates, count_pairs, ranks_of, rates_at, tpr_at_fpr
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["OperatingThresholds", "PairingThreshold", "operating_thresholds"]


@dataclass(frozen=True)
class PairingThreshold:
    """Threshold of one pairing of models, with its measured rates.

    Args:
        pairing: ``"float"`` (float probes and gallery), ``"quantized"`` (quantized probes and gallery) or ``"mixed"``
            (quantized probes, float gallery).
        threshold: cosine above which a pair is accepted; None if there are too few impostor pairs.
        rates: TPR and FPR at this threshold on the evaluation identities; None without a threshold.
        rates_at_float: TPR and FPR of this pairing at the threshold of the float pairing, as on a device that keeps it.
    """

    pairing: str
    threshold: float | None
    rates: Rates | None
    rates_at_float: Rates | None


@dataclass(frozen=True, repr=False)
class OperatingThresholds(Result):
    """Result of :func:`operating_thresholds`.

    Args:
        fpr: false-positive rate of the thresholds, as a decimal.
        identities: selection of the identities for the thresholds, as given; None for all.
        eval_identities: selection of the identities for the rates, likewise.
        pairings: results of the float, quantized and mixed pairing.
        preprocessing: preprocessing of teacher and student and its source, in words.

    Example:
        >>> result = qface.operating_thresholds("student.onnx", "teacher.onnx", "faces/", fpr="1e-2")
        >>> result.fpr
        '1e-2'
    """

    fpr: str
    identities: str | None
    eval_identities: str | None
    pairings: tuple[PairingThreshold, ...]
    preprocessing: tuple[str, str] = ("", "")

    def _key_figures(self) -> Mapping[str, object]:
        return {"fpr": self.fpr, "thresholds": {each.pairing: each.threshold for each in self.pairings}}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def operating_thresholds(
    student: Model,
    teacher: Model,
    images: Images,
    fpr: str = "1e-4",
    identities: str | Path | None = None,
    eval_identities: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> OperatingThresholds:
    """Set thresholds for float, quantized and mixed comparisons at one false-positive rate.

    Does not change ``teacher`` or ``student``.

    Args:
        student: the quantized model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        teacher: the float model, in the same forms.
        images: a folder of 112x112 crops with one subfolder per identity, or other labeled images.
        fpr: false-positive rate, a decimal between 0 and 1 such as ``"1e-4"``.
        identities: identities of a folder for the thresholds; None uses all.
        eval_identities: identities of a folder for the measured rates. None: the same identities, for which the FPR is
            the wanted one.
        batch_size: images per forward pass.
        progress: show progress on stderr.

    Returns:
        Threshold and measured rates of each pairing.

    Raises:
        ConfigError: the rate is not a decimal between 0 and 1.
        ImagesError: the images cannot be read, are unlabeled, or form no genuine or no impostor pairs.
        CheckpointError: a model file cannot be read.
        QFaceError: an embedding is not finite, or the two models have different embedding dimensions.

    Example:
        >>> result = qface.operating_thresholds("student.onnx", "teacher.onnx", "faces/", fpr="1e-2")
        >>> len(result.pairings)
        3
    """
    tuned = _labeled(images, identities, fpr)
    others = None if eval_identities is None else _labeled(images, eval_identities, fpr)
    models = as_embedder(teacher), as_embedder(student)
    seen = _embed_both(*models, tuned, batch_size)
    judged = seen if others is None else _embed_both(*models, others, batch_size)
    thresholds = {name: seen.threshold(name, fpr) for name in _PAIRINGS}
    rows = (
        PairingThreshold(name, threshold, judged.rates(name, threshold), judged.rates(name, thresholds["float"]))
        for name, threshold in thresholds.items()
    )
    return OperatingThresholds(
        fpr,
        _name(identities),
        _name(identities if eval_identities is None else eval_identities),
        tuple(rows),
        (models[0].preprocessing.describe(), models[1].preprocessing.describe()),
    )


_PAIRINGS = ("float", "quantized", "mixed")


@dataclass(frozen=True)
class _Labeled:
    """Images with identity labels."""

    source: ImageSource
    labels: Labels


@dataclass(frozen=True)
class _ModelEmbeddings:
    """Embeddings of the same images by both models."""

    teacher: Embeddings
    student: Embeddings
    labels: Labels

    def threshold(self, pairing: str, fpr: str) -> float | None:
        probes, gallery = self._embeddings(pairing)
        return tpr_at_fpr(probes, self.labels, [fpr], gallery)[fpr].threshold

    def rates(self, pairing: str, threshold: float | None) -> Rates | None:
        probes, gallery = self._embeddings(pairing)
        return None if threshold is None else rates_at(threshold, probes, self.labels, gallery)

    def _embeddings(self, pairing: str) -> tuple[Embeddings, Embeddings | None]:
        probes = self.teacher if pairing == "float" else self.student
        return probes, self.teacher if pairing == "mixed" else None


def _labeled(images: Images, identities: str | Path | None, fpr: str) -> _Labeled:
    """Open the images and check labels and rate before the slow embedding."""
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("thresholds need labeled images: pass a folder with one subfolder per identity")
    ranks_of([fpr], count_pairs(labels, ordered=True)[1])
    return _Labeled(source, labels)


def _embed_both(teacher: Embedder, student: Embedder, images: _Labeled, batch_size: int) -> _ModelEmbeddings:
    return _ModelEmbeddings(
        embed(teacher, images.source, batch_size),
        embed(student, images.source, batch_size),
        images.labels,
    )


def _name(identities: str | Path | None) -> str | None:
    return None if identities is None else str(identities)
