"""The verb ``operating_thresholds``: which cosine to accept where quantized devices meet a float network's gallery."""

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
    """The threshold of one pairing of models, and what it accepts.

    Args:
        pairing: ``"float"`` (float probes, float gallery), ``"quantized"`` (both quantized) or ``"mixed"`` (quantized
            probes, float gallery).
        threshold: the cosine above which a pair is accepted; None where there were too few impostor pairs to set it.
        rates: what it accepts of the people it is judged on; None likewise.
        rates_at_float: what the float pairing's threshold accepts, as on a device that kept it.
    """

    pairing: str
    threshold: float | None
    rates: Rates | None
    rates_at_float: Rates | None


@dataclass(frozen=True, repr=False)
class OperatingThresholds(Result):
    """Thresholds for one false-positive rate.

    Args:
        fpr: the rate that was wanted, as a decimal.
        identities: the people that thresholds were set on, as they were named; None for all.
        eval_identities: the people that rates were measured on.
        pairings: float, quantized and mixed.
        preprocessing: what the teacher and the student read and who says so, in words.

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
        """Plain Python values, ready for JSON."""
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
    """The thresholds for a false-positive rate where float meets float, quantized quantized, and quantized float.

    Does not change ``teacher`` or ``student``.

    Args:
        student: the quantized model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        teacher: the float model, likewise.
        images: a folder of 112x112 crops with one subfolder a person, or other labeled images.
        fpr: the rate, a decimal between 0 and 1 such as ``"1e-4"``.
        identities: of a folder, the people to set thresholds on.
        eval_identities: the people to measure them on; None takes the same, on which the rate is what was wanted.
        batch_size: images a forward pass.
        progress: show the stages on stderr.

    Raises:
        ConfigError: the rate is no such decimal.
        ImagesError: the images cannot be read, carry no labels, or form no genuine or no impostor pairs.
        CheckpointError: a model file cannot be read.
        QFaceError: a model gives no finite embeddings, or the two models' do not compare.

    Example:
        >>> result = qface.operating_thresholds("student.onnx", "teacher.onnx", "faces/", fpr="1e-2")
        >>> len(result.pairings)
        3
    """
    tuned = _labeled(images, identities, fpr)
    others = None if eval_identities is None else _labeled(images, eval_identities, fpr)
    models = as_embedder(teacher), as_embedder(student)
    seen = _faces(*models, tuned, batch_size)
    judged = seen if others is None else _faces(*models, others, batch_size)
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
    """Images, and who is on them."""

    source: ImageSource
    labels: Labels


@dataclass(frozen=True)
class _Faces:
    """Embeddings of the same people by both models."""

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
    """The images, checked before they take their time."""
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("thresholds need to know who is who: pass a folder with one subfolder a person")
    ranks_of([fpr], count_pairs(labels, ordered=True)[1])
    return _Labeled(source, labels)


def _faces(teacher: Embedder, student: Embedder, images: _Labeled, batch_size: int) -> _Faces:
    return _Faces(
        embed(teacher, images.source, batch_size),
        embed(student, images.source, batch_size),
        images.labels,
    )


def _name(identities: str | Path | None) -> str | None:
    return None if identities is None else str(identities)
