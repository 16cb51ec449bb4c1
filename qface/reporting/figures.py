"""Figures of results, drawn with matplotlib (extra ``qface[figures]``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qface.evaluation.stress_evaluation import StressResult
from qface.mixed_precision import Sensitivity
from qface.reporting.drawing import INK, LINES, check_figure, figure_class, new_figure, save_figure
from qface.reporting.report.data import SHOWN_FPR, Curve, LayerSize, ModelFigures

__all__ = [
    "check_figure",
    "det_figure",
    "draw_sensitivity",
    "histogram_figure",
    "latency_figure",
    "roc_figure",
    "sensitivity_figure",
    "size_figure",
    "stress_figure",
    "training_figure",
]

_INCHES_A_LAYER = 0.2
_SMOOTHED = 50  # maximum number of steps in the running mean of a training curve


def roc_figure(models: Sequence[ModelFigures]) -> Any:
    """Draw the ROC: TPR over FPR, the latter on a log axis."""
    figure, axes = new_figure()
    for model, color in zip(models, LINES, strict=False):
        band = [(fpr, 100 * low, 100 * high) for fpr, low, high in _band(model.curve)]
        _draw_band(axes, band, color)
        axes.plot(model.curve.fpr, [100 * tpr for tpr in model.curve.tpr], ".-", color=color, label=model.name)
    axes.set(xscale="log", xlabel="false-positive rate", ylabel="true-positive rate, %")
    _legend(figure)
    return figure


def det_figure(models: Sequence[ModelFigures]) -> Any:
    """Draw the DET: FNR over FPR, both on log axes."""
    figure, axes = new_figure()
    for model, color in zip(models, LINES, strict=False):
        # A log axis cannot show a rate of 0.
        points = [(fpr, 1 - tpr) for fpr, tpr in zip(model.curve.fpr, model.curve.tpr, strict=True) if tpr < 1]
        band = [(fpr, 1 - high, 1 - low) for fpr, low, high in _band(model.curve) if low < 1]
        smallest = min((fnr for _, *rates in (*points, *band) for fnr in rates if fnr > 0), default=1.0)
        _draw_band(axes, [(fpr, max(low, smallest), high) for fpr, low, high in band], color)
        axes.plot([fpr for fpr, _ in points], [fnr for _, fnr in points], ".-", color=color, label=model.name)
    axes.set(xscale="log", yscale="log", xlabel="false-positive rate", ylabel="false-negative rate")
    _legend(figure)
    return figure


def _band(curve: Curve) -> list[tuple[float, float, float]]:
    """Return (FPR, lower, upper) of the known confidence intervals of the TPR."""
    return [
        (fpr, low, high)
        for fpr, low, high in zip(curve.fpr, curve.low, curve.high, strict=True)
        if low is not None and high is not None
    ]


def _draw_band(axes: Any, band: Sequence[tuple[float, float, float]], color: str) -> None:
    """Fill the area between the second and third values of ``band`` over the first."""
    if band:
        axes.fill_between(*zip(*band, strict=True), color=color, alpha=0.2, linewidth=0)


def histogram_figure(model: ModelFigures, fpr: str) -> Any:
    """Draw the distribution of genuine and impostor cosines, with the threshold at ``fpr`` if known."""
    figure, axes = new_figure()
    edges = model.histogram.edges
    for name, color in (("impostors", LINES[1]), ("genuine", LINES[0])):
        shares = [100 * share for share in getattr(model.histogram, name)]
        axes.stairs(shares, edges, color=color, fill=True, alpha=0.35)
        axes.stairs(shares, edges, color=color, label=name)
    threshold = model.thresholds.get(fpr)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label=f"threshold, FPR {fpr}")
    axes.set(xlabel="cosine", ylabel="pairs in a bin, %", xlim=(-0.6, 1))
    _legend(figure)
    return figure


def size_figure(layers: Sequence[LayerSize]) -> Any:
    """Draw the size of each layer's weight in kB: as float32, as int8, and packed in the file."""
    figure, axes = new_figure(height=1 + _INCHES_A_LAYER * len(layers))
    rows = range(len(layers))
    kinds = (("float32", "float32_bytes"), ("8 bits", "int8_bytes"), ("in the file", "packed_bytes"))
    for (label, field), color in zip(kinds, (LINES[3], LINES[1], LINES[0]), strict=True):
        axes.plot([getattr(layer, field) / 1000 for layer in layers], rows, "o", markersize=4, color=color, label=label)
    axes.set_yticks(rows, [layer.name for layer in layers], fontsize=7)
    axes.set(xscale="log", xlabel="kB", ylim=(len(layers) - 0.5, -0.5))
    _legend(figure)
    return figure


def stress_figure(result: StressResult) -> Any:
    """Draw the TPR of reference (teacher) and model (file) at FPR 1e-3 under each condition."""
    figure, axes = new_figure(height=1 + 0.3 * len(result.figures))
    rows = range(len(result.figures))
    rates = {
        "teacher": [_percent(each.reference_tpr_at_fpr.get(SHOWN_FPR)) for each in result.figures],
        "file": [_percent(each.tpr_at_fpr[SHOWN_FPR]) for each in result.figures],
    }
    axes.hlines(rows, rates["teacher"], rates["file"], color=INK, linewidth=1)
    axes.plot(rates["teacher"], rows, "o", markersize=8, markerfacecolor="none", color=LINES[0], label="teacher")
    axes.plot(rates["file"], rows, "o", markersize=4, color=LINES[1], label="file")
    axes.set_yticks(rows, [each.condition for each in result.figures])
    axes.set(xlabel=f"true-positive rate at FPR {SHOWN_FPR}, %", ylim=(len(rows) - 0.5, -0.5))
    _legend(figure)
    return figure


def _percent(rate: float | None) -> float:
    """Return ``rate`` in percent; NaN, which is not drawn, if it could not be measured."""
    return math.nan if rate is None else 100 * rate


def latency_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the median latency per image in ms, one bar per file."""
    figure, axes = new_figure(height=1 + 0.45 * len(rows))
    bars = axes.barh([row["name"] for row in rows], [row["median_ms"] for row in rows], 0.6, color=LINES[0])
    axes.bar_label(bars, [f"{row['median_ms']:.2f} ms" for row in rows], padding=3, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("milliseconds per image, median")
    return figure


def training_figure(rows: Sequence[Mapping[str, float]]) -> Any:
    """Draw the loss of a distillation over its steps, with a running mean."""
    figure, axes = new_figure()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    length = max(min(_SMOOTHED, len(losses) // 4), 1)
    means = [sum(losses[end - length : end]) / length for end in range(length, len(losses) + 1)]
    axes.plot(steps, losses, color=LINES[0], alpha=0.35, linewidth=0.8, label="loss")
    axes.plot(steps[length - 1 :], means, color=LINES[1], label=f"mean of {length} steps")
    axes.set(yscale="log", xlabel="step", ylabel="loss")
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """Add a legend above the axes."""
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False, labelcolor=INK)


def sensitivity_figure(result: Sensitivity, path: str | Path) -> Path:
    """Draw the result of :func:`qface.sensitivity`: loss per layer, one line per bit width.

    Args:
        result: the result to draw; weights are in the upper panel, activations in the lower.
        path: file to write, ending in ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        The path.

    Raises:
        DependencyError: matplotlib is not installed.
        ExportError: the extension is not supported, or the file cannot be written.
    """
    check_figure(path)
    return save_figure(draw_sensitivity(result), path)


def draw_sensitivity(result: Sensitivity) -> Any:
    """Return the figure that :func:`sensitivity_figure` writes.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    size = (3 + _INCHES_A_LAYER * len(result.layers), 1 + 3 * len(result.tensors))
    figure = figure_class()(figsize=size, layout="constrained")
    panels = figure.subplots(len(result.tensors), squeeze=False, sharex=True)[:, 0]
    for panel, tensor in zip(panels, result.tensors, strict=True):
        _draw_losses(panel, result, tensor)
    panels[-1].set_xticks(range(len(result.layers)), [layer.name for layer in result.layers], rotation=90, fontsize=7)
    panels[0].set_title(f"one tensor quantized, the others in float, {result.images} images", fontsize="medium")
    return figure


def _draw_losses(panel: Any, result: Sensitivity, tensor: str) -> None:
    """Draw one line per bit width of ``tensor``, ``"weight"`` or ``"activation"``, with gaps."""
    from matplotlib import colormaps

    bit_widths = result.bit_widths(tensor)
    for place, bits in enumerate(bit_widths):
        losses = [of.get(bits, float("nan")) for of in result.losses(tensor)]
        color = colormaps["viridis"](place / max(len(bit_widths) - 1, 1))
        panel.plot(losses, marker=".", linewidth=0.8, color=color, label=f"{bits} bits")
    panel.set_yscale("log")
    panel.set_ylabel(f"{tensor}: 1 - cosine")
    panel.grid(axis="x", linewidth=0.3)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
