"""The figures of a report as plain values, whatever draws them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from qface.errors import ConfigError, one_line
from qface.evaluation.score_histogram import ScoreHistogram
from qface.results import Result

__all__ = [
    "SHOWN_FPR",
    "ChangedPair",
    "Changes",
    "Curve",
    "LayerSize",
    "ModelFigures",
    "ReportData",
    "verification_of_report",
]

SCHEMA_VERSION = 1
SHOWN_FPR = "1e-3"
"""False-positive rate whose threshold a histogram shows where no verdicts were compared."""


@dataclass(frozen=True)
class Curve:
    """Operating points over all pairs, in the order of falling false-positive rates.

    Args:
        fpr: false-positive rates, 0..1.
        tpr: true-positive rates, 0..1.
        threshold: the cosines above which a pair is accepted.
        low: lower ends of the 95 % confidence intervals of ``tpr``, by bootstrap over people; None where there is none.
        high: upper ends, likewise.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    threshold: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelFigures:
    """Verification by one model.

    Args:
        name: ``"teacher"`` or ``"file"``.
        runtime: what computed the embeddings.
        preprocessing: what the model reads, in words.
        dimensions: length of the embedding.
        tpr_at_fpr: true-positive rates at the usual false-positive rates; None where there are too few pairs.
        thresholds: cosines for the same rates.
        accuracy: mean of the ten folds; None without pairs.
        accuracy_std: its standard deviation over the folds.
        curve: what ROC and DET are drawn of.
        histogram: of the cosines.
    """

    name: str
    runtime: str
    preprocessing: str
    dimensions: int
    tpr_at_fpr: Mapping[str, float | None]
    thresholds: Mapping[str, float | None]
    accuracy: float | None
    accuracy_std: float | None
    curve: Curve
    histogram: ScoreHistogram


@dataclass(frozen=True)
class LayerSize:
    """Bytes of one layer's weight as float32, with a byte a weight, and as the file holds it."""

    name: str
    float32_bytes: int
    int8_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class ChangedPair:
    """Two faces whose verdict changed; pictures are data URIs, or None where faces are left out."""

    same: bool
    accepted: bool
    teacher_cosine: float
    file_cosine: float
    pictures: tuple[str, str] | None


@dataclass(frozen=True)
class Changes:
    """Changed verdicts at the thresholds of one false-positive rate.

    Args:
        fpr: the rate.
        genuine_rejected: pairs of one person that the file no longer accepts.
        genuine_accepted: pairs of one person that it accepts now.
        impostors_rejected: pairs of two people that it no longer accepts.
        impostors_accepted: pairs of two people that it accepts now.
        pairs: those that changed most.
    """

    fpr: str
    genuine_rejected: int
    genuine_accepted: int
    impostors_rejected: int
    impostors_accepted: int
    pairs: tuple[ChangedPair, ...]


@dataclass(frozen=True, repr=False)
class ReportData(Result):
    """Everything that a report shows.

    Args:
        version: of qface.
        teacher: name of the float network.
        student: name of the student's file.
        file: name of the exported file.
        steps: how the student was made, a sentence each.
        tuning_people: whom it was tuned on, in words; None if it is not known.
        eval_people: whom the figures are of, in words.
        images: images evaluated.
        identities: people on them.
        genuine_pairs: pairs of images of one person.
        impostor_pairs: pairs of images of two people.
        pairs: listed pairs for the ten folds.
        models: the teacher and the file.
        teacher_bytes: the float network as an ONNX file; None if it was not written.
        file_bytes: the exported file.
        layers: sizes of weights.
        processor: that latency was measured on.
        latency: rows of ``qface bench``; empty if it was not measured.
        sensitivity: as :meth:`qface.Sensitivity.to_dict`, or None.
        training: lines of ``log.jsonl``.
        agreement: of the file with the student: ``agrees``, ``images``, ``mean_cosine``, ``least_cosine``, and
            ``different`` of ``elements`` integers.
        changes: verdicts that changed; None if the rate cannot be measured.
        trials: what ``qface compress`` tried.
        stopped: why it ended.
        bootstrap: replicates that the intervals of the curves come from; 0 for none.
    """

    version: str
    teacher: str
    student: str
    file: str
    steps: tuple[str, ...]
    tuning_people: str | None
    eval_people: str
    images: int
    identities: int
    genuine_pairs: int
    impostor_pairs: int
    pairs: int
    models: tuple[ModelFigures, ...]
    teacher_bytes: int | None
    file_bytes: int
    layers: tuple[LayerSize, ...]
    processor: str
    latency: tuple[Mapping[str, Any], ...]
    sensitivity: Mapping[str, Any] | None
    training: tuple[Mapping[str, float], ...]
    agreement: Mapping[str, Any]
    changes: Changes | None
    trials: tuple[Mapping[str, Any], ...]
    stopped: str | None
    bootstrap: int

    def _key_figures(self) -> Mapping[str, object]:
        return {"student": self.student, "images": self.images, "agrees": self.agreement["agrees"]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def verification_of_report(record: Any) -> tuple[tuple[ModelFigures, ...], str]:
    """The models in what :meth:`ReportData.to_dict` returned, and the false-positive rate that histograms show.

    Raises:
        ConfigError: it is something else.
    """
    try:
        changes = record["changes"]
        return tuple(map(_model, record["models"])), str(changes["fpr"]) if changes else SHOWN_FPR
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this is no report ({type(error).__name__}: {one_line(error, 200)}): write it with qface report --json"
        ) from error


def _model(record: Mapping[str, Any]) -> ModelFigures:
    curve = Curve(*(_numbers(record["curve"][field.name]) for field in fields(Curve)))
    histogram = ScoreHistogram(*(_numbers(record["histogram"][field.name]) for field in fields(ScoreHistogram)))
    thresholds = dict(zip(record["thresholds"], _numbers(record["thresholds"].values()), strict=True))
    lengths = {len(values) for values in vars(curve).values()}
    if len(lengths) != 1 or {len(histogram.genuine), len(histogram.impostors)} != {len(histogram.edges) - 1}:
        raise ValueError("numbers are missing")
    return ModelFigures(**{**record, "curve": curve, "histogram": histogram, "thresholds": thresholds})


def _numbers(values: Iterable[Any]) -> tuple[Any, ...]:
    """``values`` as floats; None, for what is not known, stays."""
    return tuple(None if value is None else float(value) for value in values)
