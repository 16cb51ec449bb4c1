"""Figures of a report as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from qface.errors import ConfigError, one_line
from qface.evaluation.bootstrap import Interval, TprDrop
from qface.evaluation.score_histogram import ScoreHistogram
from qface.evaluation.stress_evaluation import StressFigures, StressResult
from qface.results import Result

__all__ = [
    "SHOWN_FPR",
    "ChangedPair",
    "Changes",
    "Curve",
    "LayerSize",
    "ModelFigures",
    "ReportData",
    "stress_of_report",
    "verification_of_report",
]

SCHEMA_VERSION = 1
SHOWN_FPR = "1e-3"
"""FPR of the figure of stress conditions, and of the threshold in histograms of reports without changed verdicts."""


@dataclass(frozen=True)
class Curve:
    """Operating points over all pairs, by decreasing FPR.

    Args:
        fpr: false-positive rates, 0..1.
        tpr: true-positive rates, 0..1.
        threshold: cosines above which a pair is accepted.
        low: lower ends of the 95 % confidence intervals of ``tpr``, by bootstrap over identities; None if not measured.
        high: upper ends, likewise.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    threshold: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True)
class ModelFigures:
    """Verification figures of one model.

    Args:
        name: ``"teacher"`` or ``"file"``.
        runtime: name of the runtime that computed the embeddings.
        preprocessing: description of the model's preprocessing.
        dimensions: embedding dimension.
        tpr_at_fpr: TPR by FPR; None with too few pairs.
        thresholds: cosine threshold by FPR, likewise.
        accuracy: mean accuracy over ten folds, 0..1; None without listed pairs.
        accuracy_std: standard deviation of the accuracy over the folds.
        curve: points of ROC and DET.
        histogram: histogram of the cosines.
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
    """Size of one layer's weight in bytes: as float32, as int8, and packed in the file."""

    name: str
    float32_bytes: int
    int8_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class ChangedPair:
    """Pair of faces whose verdict changed; ``pictures`` are data URIs, or None if faces are not shown."""

    same: bool
    accepted: bool
    teacher_cosine: float
    file_cosine: float
    pictures: tuple[str, str] | None


@dataclass(frozen=True)
class Changes:
    """Pairs that teacher and file judge differently, each at its threshold for one FPR.

    Args:
        fpr: the false-positive rate.
        genuine_rejected: number of genuine pairs that only the teacher accepts.
        genuine_accepted: number of genuine pairs that only the file accepts.
        impostors_rejected: number of impostor pairs that only the teacher accepts.
        impostors_accepted: number of impostor pairs that only the file accepts.
        pairs: the pairs with the largest change.
    """

    fpr: str
    genuine_rejected: int
    genuine_accepted: int
    impostors_rejected: int
    impostors_accepted: int
    pairs: tuple[ChangedPair, ...]


@dataclass(frozen=True, repr=False)
class ReportData(Result):
    """All figures of a report.

    Args:
        version: version of qface.
        teacher: name of the float network.
        student: name of the student's file.
        file: name of the exported file.
        steps: provenance of the student, one sentence per step.
        tuning_people: identities that the student was tuned on; None if unknown.
        eval_people: identities of the evaluation.
        images: number of evaluated images.
        identities: number of their identities.
        genuine_pairs: number of genuine pairs.
        impostor_pairs: number of impostor pairs.
        pairs: number of listed pairs for the ten folds.
        models: figures of the teacher and of the file.
        teacher_bytes: size of the float network as an ONNX file; None if not measured.
        file_bytes: size of the exported file.
        layers: size of each weight.
        processor: name of the processor of the latency measurement.
        latency: rows of ``qface bench``; empty if not measured.
        sensitivity: output of :meth:`qface.Sensitivity.to_dict`, or None.
        training: lines of ``log.jsonl``.
        agreement: comparison of file and student: ``agrees``, ``images``, ``mean_cosine``, ``min_cosine``,
            ``layers``, ``different`` and ``elements`` (integers that differ, and all integers).
        changes: changed verdicts; None if the FPR cannot be measured.
        trials: trials of ``qface compress``.
        stopped: reason why the search of ``qface compress`` ended.
        bootstrap: number of replicates for the confidence intervals of the curves; 0 for none.
        stress: the file under stress conditions, with the teacher as the reference; None if not measured.
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
    stress: StressResult | None

    def _key_figures(self) -> Mapping[str, object]:
        return {"student": self.student, "images": self.images, "agrees": self.agreement["agrees"]}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values for JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def verification_of_report(record: Any) -> tuple[tuple[ModelFigures, ...], str]:
    """Parse the models, and the FPR of the histograms, from the output of :meth:`ReportData.to_dict`.

    Raises:
        ConfigError: ``record`` is not such an output.
    """
    with _read_as_report():
        changes = record["changes"]
        return tuple(map(_model, record["models"])), str(changes["fpr"]) if changes else SHOWN_FPR


def stress_of_report(record: Any) -> StressResult:
    """Parse the stress conditions from the output of :meth:`ReportData.to_dict`.

    Raises:
        ConfigError: ``record`` is not such an output, or has no stress conditions.
    """
    with _read_as_report():
        stress = record["stress"]
        if stress is not None:
            return StressResult(**{**stress, "figures": tuple(map(_condition, stress["figures"]))})
    raise ConfigError("the report has no stress conditions: write it with qface report --stress --json")


@contextmanager
def _read_as_report() -> Iterator[None]:
    """Turn errors of a record that is not a report into one line."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"not a report ({type(error).__name__}: {one_line(error, 200)}): write it with qface report --json"
        ) from error


def _condition(record: Mapping[str, Any]) -> StressFigures:
    rates = ("tpr_at_fpr", "reference_tpr_at_fpr")
    numbers = {name: dict(zip(record[name], _numbers(record[name].values()), strict=True)) for name in rates}
    drops = {fpr: None if drop is None else _drop(drop) for fpr, drop in record["drops"].items()}
    return StressFigures(**{**record, **numbers, "drops": drops})


def _drop(record: Mapping[str, Any]) -> TprDrop:
    return TprDrop(**{**record, "interval": Interval(**record["interval"])})


def _model(record: Mapping[str, Any]) -> ModelFigures:
    curve = Curve(*(_numbers(record["curve"][field.name]) for field in fields(Curve)))
    histogram = ScoreHistogram(*(_numbers(record["histogram"][field.name]) for field in fields(ScoreHistogram)))
    thresholds = dict(zip(record["thresholds"], _numbers(record["thresholds"].values()), strict=True))
    lengths = {len(values) for values in vars(curve).values()}
    if len(lengths) != 1 or {len(histogram.genuine), len(histogram.impostors)} != {len(histogram.edges) - 1}:
        raise ValueError("numbers are missing")
    return ModelFigures(**{**record, "curve": curve, "histogram": histogram, "thresholds": thresholds})


def _numbers(values: Iterable[Any]) -> tuple[Any, ...]:
    """Convert ``values`` to floats; None is kept."""
    return tuple(None if value is None else float(value) for value in values)
