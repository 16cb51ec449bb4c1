"""The verb ``plot``: write one figure of a report to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qface.checks import check_choice
from qface.choices import FigureKind
from qface.errors import ConfigError
from qface.files import as_path
from qface.reporting import figures
from qface.reporting.drawing import check_figure, save_figure
from qface.reporting.report.data import ModelFigures, stress_of_report, verification_of_report
from qface.reporting.report.measure import layer_sizes
from qface.reporting.run_files import read_json, read_training, training_log

__all__ = ["plot"]


def plot(kind: FigureKind, source: str | Path, output: str | Path) -> Path:
    """Draw one figure of :func:`qface.report` to a file.

    Args:
        kind: ``"roc"``, ``"det"``, ``"histogram-teacher"``, ``"histogram-file"``, ``"size"``, ``"stress"`` or
            ``"training"``.
        source: input of the figure. ``"size"``: an exported file; ``"training"``: ``log.jsonl`` of a distillation, or
            its run folder; other kinds: the JSON output of ``qface report --json``.
        output: the file to write, ending in ``.svg``, ``.png`` or ``.pdf``.

    Returns:
        The path ``output``.

    Raises:
        ConfigError: the kind is unknown, or ``source`` does not fit it.
        DependencyError: matplotlib is not installed.
        ExportError: the extension is not supported, or the file cannot be written.
        QFaceError: the exported file cannot be read.

    Example:
        >>> qface.plot("size", "student.onnx", "size.svg").name
        'size.svg'
    """
    check_choice(FigureKind, kind=kind)
    check_figure(output)
    return save_figure(_drawn(kind, as_path(source)), output)


def _drawn(kind: FigureKind, source: Path) -> Any:
    if kind == "size":
        return figures.size_figure(layer_sizes(str(source)))
    if kind == "training":
        return figures.training_figure(read_training(training_log(source)))
    if kind == "stress":
        return figures.stress_figure(stress_of_report(read_json(source)))
    models, fpr = verification_of_report(read_json(source))
    if kind == "roc":
        return figures.roc_figure(models)
    if kind == "det":
        return figures.det_figure(models)
    return figures.histogram_figure(_named(kind.removeprefix("histogram-"), models), fpr)


def _named(name: str, models: Sequence[ModelFigures]) -> ModelFigures:
    found = [model for model in models if model.name == name]
    if not found:
        raise ConfigError(f"the report has no model {name!r}: write it with qface report --json")
    return found[0]
