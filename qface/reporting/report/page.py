"""HTML page of a report, without external resources."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qface.errors import DependencyError
from qface.evaluation.stress_evaluation import STRESS_FPRS, StressFigures, StressResult
from qface.mixed_precision import Sensitivity
from qface.reporting import figures
from qface.reporting.drawing import figure_class, inline_svg
from qface.reporting.report.data import SHOWN_FPR, Curve, ModelFigures, ReportData
from qface.reporting.tables import percent, stress_losses

__all__ = ["check_page", "report_page"]

_TRAINING_ROWS = 20


@dataclass(frozen=True)
class Table:
    """Table of strings; the first cell of each row is its header."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """Figure with its data as a table, which is folded unless ``shows_table``."""

    title: str
    svg: str
    table: Table
    wide: bool = False
    shows_table: bool = False


def check_page() -> None:
    """Raise if a package for pages is missing; called before long work.

    Raises:
        DependencyError: jinja2 or matplotlib is not installed.
    """
    figure_class()
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError("reports need jinja2: pip install 'qface[report]'") from error


def report_page(data: ReportData) -> str:
    """Return the HTML page of ``data``; equal data give an equal page.

    Raises:
        DependencyError: jinja2 or matplotlib is not installed.
    """
    check_page()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qface.reporting.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["megabytes"] = lambda count: f"{count / 1e6:.2f} MB"
    return environment.get_template("page.html.j2").render(
        data=data,
        accuracy=_accuracy(data.models),
        curves=[_roc(data.models), _det(data.models)],
        histograms=[_histogram(model, data) for model in data.models],
        thresholds=_thresholds(data.models),
        size=_size(data),
        latency=_latency(data) if data.latency else None,
        sensitivity=None if data.sensitivity is None else _sensitivity(Sensitivity.from_dict(data.sensitivity)),
        training=_training(data) if data.training else None,
        stress=None if data.stress is None else _stress(data.stress),
        trials=_trials(data) if data.trials else None,
    )


def _accuracy(models: Sequence[ModelFigures]) -> Table:
    before, after = models
    rows: list[tuple[str, ...]] = [
        (f"TPR at FPR {fpr}", percent(rate), percent(after.tpr_at_fpr[fpr]), _points(rate, after.tpr_at_fpr[fpr]))
        for fpr, rate in before.tpr_at_fpr.items()
    ]
    if before.accuracy is not None:
        folds = (f"{percent(model.accuracy)} ± {100 * (model.accuracy_std or 0):.2f}" for model in models)
        rows.append(("ten-fold accuracy", *folds, _points(before.accuracy, after.accuracy)))
    return Table("Verification before and after", ("", "teacher", "file", "change, points"), tuple(rows))


def _points(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{100 * (after - before):+.2f}"


def _thresholds(models: Sequence[ModelFigures]) -> Table:
    rows = ((fpr, *(_number(model.thresholds[fpr]) for model in models)) for fpr in models[0].thresholds)
    return Table("Cosines above which a pair is accepted", ("FPR", "teacher", "file"), tuple(rows))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _curve_table(models: Sequence[ModelFigures], caption: str) -> Table:
    found = [_rates_by_fpr(model.curve) for model in models]
    rates = sorted(set().union(*found))
    rows = ((f"{fpr:g}", *(curve.get(fpr, "-") for curve in found)) for fpr in rates)
    return Table(caption, ("FPR", *(f"TPR, {model.name}" for model in models)), tuple(rows))


def _rates_by_fpr(curve: Curve) -> dict[float, str]:
    """Format each TPR with its interval, by FPR."""
    ends = zip(curve.low, curve.high, strict=True)
    brackets = ("" if low is None or high is None else f" [{100 * low:.2f}, {100 * high:.2f}]" for low, high in ends)
    rates = (f"{percent(tpr)}{bracket}" for tpr, bracket in zip(curve.tpr, brackets, strict=True))
    return dict(zip(curve.fpr, rates, strict=True))


def _roc(models: Sequence[ModelFigures]) -> Figure:
    svg = inline_svg(
        figures.roc_figure(models), "roc", "ROC", "True-positive over false-positive rates of both models."
    )
    return Figure("ROC", svg, _curve_table(models, "Points of the ROC"))


def _det(models: Sequence[ModelFigures]) -> Figure:
    svg = inline_svg(figures.det_figure(models), "det", "DET", "False-negative over false-positive rates of both.")
    return Figure("DET", svg, _curve_table(models, "Points of the DET; the false-negative rate is 100 % - TPR"))


def _histogram(model: ModelFigures, data: ReportData) -> Figure:
    fpr = data.changes.fpr if data.changes else SHOWN_FPR
    title = f"Cosines, {model.name}"
    name = f"histogram-{model.name}"
    svg = inline_svg(figures.histogram_figure(model, fpr), name, title, "Shares of genuine and of impostor pairs.")
    histogram = model.histogram
    bins = zip(histogram.edges, histogram.edges[1:], histogram.genuine, histogram.impostors, strict=False)
    rows = ((f"{low:.3f} to {high:.3f}", percent(one), percent(two)) for low, high, one, two in bins if one or two)
    return Figure(title, svg, Table("Shares of pairs", ("cosine", "genuine", "impostors"), tuple(rows)))


def _size(data: ReportData) -> Figure:
    svg = inline_svg(figures.size_figure(data.layers), "size", "Size by layer", "Kilobytes of each layer's weight.")
    rows = (
        (each.name, *(f"{size:,}" for size in (each.float32_bytes, each.int8_bytes, each.packed_bytes)))
        for each in data.layers
    )
    return Figure(
        "Size by layer", svg, Table("Bytes of weights", ("layer", "float32", "8 bits", "in the file"), tuple(rows))
    )


def _latency(data: ReportData) -> Figure:
    svg = inline_svg(figures.latency_figure(data.latency), "latency", "Latency", "Median time of an image by file.")
    rows = (
        (row["name"], f"{row['median_ms']:.3f}", f"{row['minimum_ms']:.3f}", f"{row['ratio']:.3f}", row["provider"])
        for row in data.latency
    )
    columns = ("file", "median, ms", "minimum, ms", "ratio", "provider")
    return Figure("Latency", svg, Table("Time of one image, one thread", columns, tuple(rows)))


def _sensitivity(result: Sensitivity) -> Figure:
    svg = inline_svg(figures.draw_sensitivity(result), "sensitivity", "Sensitivity", "Loss of each layer by bits.")
    widths = [(tensor, bits) for tensor in result.tensors for bits in result.bit_widths(tensor)]
    rows = (
        (layer.name, *(_thousandths(getattr(layer, tensor).get(bits)) for tensor, bits in widths))
        for layer in result.layers
    )
    columns = ("layer", *(f"{tensor}, {bits} bits" for tensor, bits in widths))
    return Figure("Sensitivity", svg, Table("1000 x (1 - cosine)", columns, tuple(rows)), wide=True)


def _thousandths(loss: float | None) -> str:
    return "-" if loss is None else f"{1000 * loss:.3f}"


def _training(data: ReportData) -> Figure:
    svg = inline_svg(
        figures.training_figure(data.training), "training", "Training", "Loss of the distillation by step."
    )
    rows = data.training[:: max(len(data.training) // _TRAINING_ROWS, 1)]
    columns = ("step", "loss", "learning_rate")
    texts = (tuple(f"{row.get(column, float('nan')):g}" for column in columns) for row in rows)
    return Figure("Training", svg, Table("Some of the steps", ("step", "loss", "learning rate"), tuple(texts)))


def _stress(result: StressResult) -> Figure:
    title = "Stress conditions"
    svg = inline_svg(figures.stress_figure(result), "stress", title, "True-positive rates of both by condition.")
    rates = [f"TPR at {fpr}" for fpr in STRESS_FPRS]
    names = [*rates, "accuracy"] if any(each.accuracy is not None for each in result.figures) else rates
    columns = ("condition", *(f"{name}, {of}" for name in names for of in ("teacher", "file", "lost")))
    rows = (_stress_row(each, len(names)) for each in result.figures)
    return Figure(title, svg, Table("Changed against unchanged faces", columns, tuple(rows)), shows_table=True)


def _stress_row(figures: StressFigures, length: int) -> tuple[str, ...]:
    """Return the condition, and for each of ``length`` rates the teacher's, the file's and the loss."""
    before = [*figures.reference_tpr_at_fpr.values(), figures.reference_accuracy]
    after = [*figures.tpr_at_fpr.values(), figures.accuracy]
    cells = zip(map(percent, before), map(percent, after), stress_losses(figures), strict=True)
    return (figures.condition, *(cell for rate in itertools.islice(cells, length) for cell in rate))


def _trials(data: ReportData) -> Table:
    columns = tuple(dict.fromkeys(key for trial in data.trials for key in trial))
    rows = (tuple(_cells(trial.get(column, "-") for column in columns)) for trial in data.trials)
    return Table("Trials", columns, tuple(rows))


def _cells(values: Iterable[Any]) -> Iterable[str]:
    return (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
