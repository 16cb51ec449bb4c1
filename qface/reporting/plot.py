"""The verb ``plot``: one figure of a report in a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from qface.choices import FigureKind
from qface.compression.run_record import RunRecord
from qface.errors import ConfigError
from qface.files import as_path
from qface.reporting import figures
from qface.reporting.drawing import check_figure, save_figure
from qface.reporting.report.data import ModelFigures, verification_of_report
from qface.reporting.report.measure import layer_sizes, read_json, read_training

__all__ = ["plot"]


def plot(kind: FigureKind, source: str | Path, output: str | Path) -> Path:
    """Draw one figure of :func:`qface.report`.

    Args:
        kind: which figure.
        source: what it is drawn of: for ``"roc"``, ``"det"``, ``"histogram-teacher"`` and ``"histogram-file"`` the JSON
            that ``qface report --json`` prints; for ``"size"`` an exported file; for ``"training"`` ``log.jsonl`` of a
            distillation, or its run folder.
        output: the file to write, ending in ``.svg``, ``.png`` or ``.pdf``.

    Returns:
        ``output``.

    Raises:
        ConfigError: there is no such kind, or ``source`` is something else.
        DependencyError: matplotlib is not installed.
        ExportError: the file cannot be written in this form or place.
        QFaceError: the exported file cannot be read.

    Example:
        >>> qface.plot("size", "student.onnx", "size.svg").name
        'size.svg'
    """
    if kind not in get_args(FigureKind):
        raise ConfigError(f"kind is one of {', '.join(get_args(FigureKind))}, not {kind!r}")
    check_figure(output)
    return save_figure(_drawn(kind, as_path(source)), output)


def _drawn(kind: FigureKind, source: Path) -> Any:
    if kind == "size":
        return figures.size_figure(layer_sizes(str(source)))
    if kind == "training":
        return figures.training_figure(read_training(str(_log(source))))
    models, fpr = verification_of_report(read_json(str(source)))
    if kind == "roc":
        return figures.roc_figure(models)
    if kind == "det":
        return figures.det_figure(models)
    return figures.histogram_figure(_named(kind.removeprefix("histogram-"), models), fpr)


def _named(name: str, models: Sequence[ModelFigures]) -> ModelFigures:
    found = [model for model in models if model.name == name]
    if not found:
        raise ConfigError(f"the report has no model {name}: write it with qface report --json")
    return found[0]


def _log(source: Path) -> Path:
    """The log in the run folder of a distillation or a compression, or the file itself."""
    if not source.is_dir():
        return source
    own = source / "log.jsonl"
    if own.exists():
        return own
    log = RunRecord.read(source).log
    if log is None:
        raise ConfigError(f"{source} holds no log, since nothing was trained: pass a run that distilled")
    return Path(log)
