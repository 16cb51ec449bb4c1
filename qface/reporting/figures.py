"""Results as figures in files; matplotlib (extra ``qface[figures]``) is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qface.errors import DependencyError, ExportError
from qface.files import check_folder, replacing
from qface.quantization.sensitivity import Sensitivity

__all__ = ["check_figure", "sensitivity_figure"]

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the files that can be drawn."""

_UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_INCHES_A_LAYER = 0.2


def check_figure(path: str | Path) -> None:
    """Make sure, before long work, that a figure can be drawn at its end.

    Raises:
        DependencyError: matplotlib is not installed.
        ExportError: ``path`` ends in none of :data:`FORMATS`, or its folder cannot be written to.
    """
    _figure_class()
    if Path(path).suffix not in FORMATS:
        raise ExportError(f"{path} does not end in {', '.join(FORMATS)}; choose such a name")
    check_folder(path)


def sensitivity_figure(result: Sensitivity, path: str | Path) -> Path:
    """Draw the losses of :func:`qface.sensitivity`: a line per bit width over the layers, weights above activations.

    Args:
        result: what was measured.
        path: file to write, one of :data:`FORMATS`.

    Returns:
        The path.

    Raises:
        DependencyError: matplotlib is not installed.
        ExportError: the file cannot be written in this form or place.
    """
    path = Path(path)
    check_figure(path)
    from matplotlib import rc_context

    size = (3 + _INCHES_A_LAYER * len(result.layers), 1 + 3 * len(result.tensors))
    figure = _figure_class()(figsize=size, layout="constrained")
    panels = figure.subplots(len(result.tensors), squeeze=False, sharex=True)[:, 0]
    for panel, tensor in zip(panels, result.tensors, strict=True):
        _draw_losses(panel, result, tensor)
    panels[-1].set_xticks(range(len(result.layers)), [layer.name for layer in result.layers], rotation=90, fontsize=7)
    panels[0].set_title(f"one tensor quantized, all else in float, {result.images} images", fontsize="medium")
    kind = path.suffix[1:]
    # Neither dates nor random names, so that one result gives one file.
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "qface"}):
        figure.savefig(temporary, format=kind, dpi=150, metadata=_UNDATED.get(kind))
    return path


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DependencyError("figures need matplotlib: pip install 'qface[figures]'") from error
    return Figure


def _draw_losses(panel: Any, result: Sensitivity, tensor: str) -> None:
    """A line for each bit width of ``tensor``, ``"weight"`` or ``"activation"``, broken where it has none."""
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
