"""Measurement of the figures of a report."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from qface._version import __version__
from qface.checks import check_choice, check_whole
from qface.compression.run_record import RunRecord
from qface.data.folders import ImageFolder
from qface.data.images import Labels, labels_of
from qface.data.pairs import ResolvedPairs, read_pairs, resolve_pairs
from qface.data.sample import evenly
from qface.data.subset import Subset
from qface.deployment import Agreement, export, measure_size, verify
from qface.deployment.latency import compare, open_file
from qface.errors import ImagesError
from qface.evaluation.bootstrap import REPLICATES, Interval, bootstrap_tpr
from qface.evaluation.embedding import Embedder, Embeddings, as_embedder
from qface.evaluation.evaluate import listed_cosines
from qface.evaluation.score_histogram import score_histogram
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.stress_evaluation import StressResult, evaluate_stress
from qface.evaluation.verdicts import VerdictChange, Verifier, verdict_changes
from qface.evaluation.verification import FPRS, OperatingPoint, count_pairs, ten_fold_accuracy, tpr_at_fpr, usable_folds
from qface.files import temporary_folder
from qface.mixed_precision import Sensitivity
from qface.models.resolve import as_network, resolve_model
from qface.parallel import processes_for
from qface.preprocessing import PreprocessingOverride
from qface.provenance import provenance_of
from qface.reporting.report.data import ChangedPair, Changes, Curve, LayerSize, ModelFigures, ReportData
from qface.reporting.run_files import read_json, read_training
from qface.reporting.steps import steps_in_words

__all__ = ["ReportSettings", "layer_sizes", "measure_report"]

_RATES = tuple(f"{digit}e-{power}" for power in range(1, 7) for digit in (5, 2, 1))
_RATES_WITH_CONFIDENCE = tuple(rate for rate in _RATES if float(rate) <= float(FPRS[0]))
"""Larger FPRs would take most of the time, since they accept many impostors, and their intervals are narrow anyway."""
_VERIFIED = 128


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a report's measurements.

    Args:
        fpr: false-positive rate at which verdicts are compared, one of :data:`qface.evaluation.verification.FPRS`.
        faces: True to include pictures of faces in the page.
        latency_runs: number of timed runs of each file; 0 skips latency.
        bootstrap: bootstrap replicates over identities for the curves; 0 skips the confidence intervals.
        preprocessing: preprocessing of the teacher, or some of its fields; replaces the detected one.
        stress: True to measure both models under stress conditions too.
        run_dir: folder for embeddings, from which an interrupted report resumes; None saves nothing.
    """

    fpr: str = "1e-3"
    faces: bool = True
    latency_runs: int = 40
    bootstrap: int = REPLICATES
    preprocessing: PreprocessingOverride | None = None
    stress: bool = False
    run_dir: Path | None = None

    def __post_init__(self) -> None:
        check_whole(0, bootstrap=self.bootstrap, latency_runs=self.latency_runs)
        check_choice(FPRS, fpr=self.fpr)

    def folder_of(self, name: str) -> Path | None:
        """Return the folder inside ``run_dir`` for the embeddings called ``name``; None without ``run_dir``."""
        return None if self.run_dir is None else self.run_dir / name


def measure_report(run: RunRecord, settings: ReportSettings) -> ReportData:
    """Measure the teacher and the exported file of ``run`` on its faces.

    Raises:
        QFaceError: a model, the faces or another file of the run cannot be used.
    """
    sensitivity, training = _sensitivity(run.sensitivity), () if run.log is None else read_training(run.log)
    faces = _Faces.of(run)
    network = None if _is_onnx(run.teacher) else resolve_model(run.teacher, preprocessing=settings.preprocessing)
    teacher = as_embedder(run.teacher if network is None else network, settings.preprocessing)
    file = as_embedder(run.file)
    student = as_network(run.student)
    found = [_embed(name, each, faces.folder, settings) for name, each in (("teacher", teacher), ("file", file))]
    models = tuple(
        _figures(name, embedder, embeddings, faces, settings.bootstrap)
        for name, embedder, embeddings in zip(("teacher", "file"), (teacher, file), found, strict=True)
    )
    teacher_bytes, latency = _latency(run, network, settings)
    genuine, impostors = count_pairs(faces.labels)
    return ReportData(
        version=__version__,
        teacher=Path(run.teacher).name,
        student=Path(run.student).name,
        file=Path(run.file).name,
        steps=steps_in_words(provenance_of(student)),
        tuning_people=run.tuning_people,
        eval_people=run.eval_people or "all people",
        images=len(faces.folder),
        identities=faces.folder.num_identities,
        genuine_pairs=genuine,
        impostor_pairs=impostors,
        pairs=0 if faces.listed is None else len(faces.listed),
        models=models,
        teacher_bytes=teacher_bytes,
        file_bytes=Path(run.file).stat().st_size,
        layers=layer_sizes(run.file),
        processor=_processor(),
        latency=latency,
        sensitivity=sensitivity,
        training=training,
        agreement=_agreement(verify(student, run.file, _sample(faces.folder))),
        changes=_changes(models, found, faces, settings),
        trials=run.trials,
        stopped=run.stopped,
        bootstrap=settings.bootstrap,
        stress=_stress(run, teacher, file, faces.folder, settings) if settings.stress else None,
    )


@dataclass(frozen=True)
class _Faces:
    """Images and pairs of the evaluation."""

    folder: ImageFolder
    labels: Labels
    listed: ResolvedPairs | None

    @classmethod
    def of(cls, run: RunRecord) -> _Faces:
        folder = ImageFolder(run.images, run.eval_people)
        labels = labels_of(folder)
        if labels is None:
            raise ImagesError(f"a report needs identities, but {run.images} has no subfolder per identity: add them")
        count_pairs(labels)
        listed = None if run.pairs is None else resolve_pairs(read_pairs(run.pairs), folder)
        if listed is not None:
            usable_folds(listed.same, listed.fold)
        return cls(folder, labels, listed)


def _embed(name: str, embedder: Embedder, folder: ImageFolder, settings: ReportSettings) -> Embeddings:
    return embed_shared(embedder, folder, processes_for(None), settings.folder_of(name))


def _stress(
    run: RunRecord, teacher: Embedder, file: Embedder, folder: ImageFolder, settings: ReportSettings
) -> StressResult:
    return evaluate_stress(
        file,
        folder,
        run.pairs,
        reference=teacher,
        bootstrap=settings.bootstrap,
        run_dir=settings.folder_of("stress"),
    )


def _is_onnx(model: str) -> bool:
    return model.lower().endswith(".onnx")


def _figures(name: str, embedder: Embedder, embeddings: Embeddings, faces: _Faces, replicates: int) -> ModelFigures:
    points = tpr_at_fpr(embeddings, faces.labels, _RATES)
    intervals: dict[str, Interval | None] = {}
    if replicates:
        intervals = bootstrap_tpr(embeddings, faces.labels, _RATES_WITH_CONFIDENCE, replicates=replicates)
    listed = faces.listed
    accuracy = (
        None
        if listed is None
        else ten_fold_accuracy(listed_cosines(listed, embeddings, embeddings), listed.same, listed.fold)
    )
    return ModelFigures(
        name=name,
        runtime=str(getattr(embedder, "runtime", type(embedder).__name__)),
        preprocessing=embedder.preprocessing.describe(),
        dimensions=embeddings.shape[1],
        tpr_at_fpr={fpr: points[fpr].tpr for fpr in FPRS},
        thresholds={fpr: points[fpr].threshold for fpr in FPRS},
        accuracy=None if accuracy is None else accuracy[0],
        accuracy_std=None if accuracy is None else accuracy[1],
        curve=_curve(points, intervals),
        histogram=score_histogram(embeddings, faces.labels),
    )


def _curve(points: Mapping[str, OperatingPoint], intervals: Mapping[str, Interval | None]) -> Curve:
    measured = []
    for fpr, point in points.items():
        if point.tpr is not None and point.threshold is not None:
            interval = intervals.get(fpr)
            ends = (None, None) if interval is None else (interval.low, interval.high)
            measured.append((float(fpr), point.tpr, point.threshold, *ends))
    return Curve(*zip(*measured, strict=True)) if measured else Curve((), (), (), (), ())


def _latency(
    run: RunRecord, network: nn.Module | None, settings: ReportSettings
) -> tuple[int | None, tuple[Mapping[str, Any], ...]]:
    """Return the size of the teacher as an ONNX file, and the latency of both files, run alternately."""
    if not settings.latency_runs:
        return None, ()
    with temporary_folder() as folder:
        teacher = Path(run.teacher) if network is None else export(network, folder / "teacher.onnx")
        cpu = ["CPUExecutionProvider"]
        candidates = [
            open_file(teacher, name="teacher", providers=cpu, preprocessing=settings.preprocessing),
            open_file(run.file, name="file", providers=cpu),
        ]
        rows = tuple(row.to_dict() for row in compare(candidates, runs=settings.latency_runs))
        return teacher.stat().st_size, rows


def _processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def layer_sizes(file: str) -> tuple[LayerSize, ...]:
    """Return the size of each weight in an exported file.

    Raises:
        QFaceError: the file cannot be read.
    """
    weights = measure_size(file).of_kind("weight").entries
    return tuple(
        LayerSize(each.name.removesuffix(".weight"), each.fp32_bytes, each.elements, each.bytes) for each in weights
    )


def _sample(folder: ImageFolder) -> Subset:
    return Subset(folder, evenly(len(folder), _VERIFIED).tolist())


def _agreement(found: Agreement) -> dict[str, Any]:
    return {
        "agrees": found.agrees,
        "images": found.images,
        "mean_cosine": found.mean_cosine,
        "min_cosine": found.min_cosine,
        "layers": len(found.layers),
        "different": sum(layer.different for layer in found.layers),
        "elements": sum(layer.elements for layer in found.layers),
    }


def _changes(
    models: tuple[ModelFigures, ...], embeddings: list[Embeddings], faces: _Faces, settings: ReportSettings
) -> Changes | None:
    before, after = (model.thresholds[settings.fpr] for model in models)
    if before is None or after is None:
        return None
    found = verdict_changes(Verifier(embeddings[0], before), Verifier(embeddings[1], after), faces.labels)
    pairs = tuple(_changed_pair(change, faces.folder, settings.faces) for change in found.largest)
    return Changes(
        fpr=settings.fpr,
        genuine_rejected=found.counts[True, False],
        genuine_accepted=found.counts[True, True],
        impostors_rejected=found.counts[False, False],
        impostors_accepted=found.counts[False, True],
        pairs=pairs,
    )


def _changed_pair(change: VerdictChange, folder: ImageFolder, shown: bool) -> ChangedPair:
    pictures = (_picture(folder, change.first), _picture(folder, change.second)) if shown else None
    return ChangedPair(change.same, change.accepted, change.before, change.after, pictures)


def _picture(folder: ImageFolder, index: int) -> str:
    """Return an image as a data URI."""
    file = io.BytesIO()
    Image.fromarray(folder.read([index])[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _sensitivity(path: str | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    return Sensitivity.from_dict(read_json(path)).to_dict()
