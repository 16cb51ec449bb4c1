"""Comparison of measured figures with the paper's."""

from __future__ import annotations

from typing import Protocol

from harness.records import Record

import qface
from paper.arms import Unavailable
from paper.rows import FLOAT, TABLES, Method, Row
from paper.sources import HALF_COLUMNS

__all__ = ["FigureSource", "compare", "format_cell", "tpr_at_1e_4"]


class FigureSource(Protocol):
    """Source of the measured figures of a network and method."""

    def figures(self, network: str, method: Method) -> Record:
        """Return the figures by column."""


def compare(row: Row, arms: FigureSource) -> Record:
    """Measure a row, and return its printed and measured figures.

    Args:
        row: a row of the paper, or of a stand-in network.
        arms: source of the measured figures.
    """
    line = {"network": row.network, "label": row.label, "method": row.method.name, **_printed(row)}
    try:
        measured, teacher = arms.figures(row.network, row.method), arms.figures(row.network, FLOAT)
    except (Unavailable, qface.QFaceError) as error:
        return {**line, "measured": {}, "missing": str(error), "failed": not isinstance(error, Unavailable)}
    measured = {**measured, "lost": _lost(row, measured, teacher)}
    return {**line, "measured": measured, "missing": None, "failed": False}


def _printed(row: Row) -> Record:
    images = None if row.images is None else round(1e6 * row.images)
    printed = {**row.printed, "mb": row.mb, "images": images, "lost": _lost(row, row.printed, _printed_float(row))}
    return {"printed": printed, "remark": row.remark}


def _printed_float(row: Row) -> dict[str, float]:
    """Return the paper's figures for the float network of a row; empty for models of other authors."""
    if row.method.kind not in ("ours", "pruned"):
        return {}
    floats = (each for each in TABLES[1].rows if each.method.kind == "float")
    return next((each.printed for each in floats if each.network == row.network), {})


def _lost(row: Row, figures: Record, teacher: Record) -> float | None:
    """Return the loss in TPR at FPR 1e-4 relative to the float network, in percentage points."""
    if row.method.kind == "float":
        return None
    before, after = tpr_at_1e_4(teacher), tpr_at_1e_4(figures)
    return None if before is None or after is None else before - after


def tpr_at_1e_4(figures: Record) -> float | None:
    """Return TPR at FPR 1e-4 in percent, on IJB-C if measured there, else on the second half of LFW.

    Args:
        figures: figures by column.
    """
    columns = ("ijbc-1e-4", HALF_COLUMNS["1e-4"])
    return next((value for column in columns if (value := figures.get(column)) is not None), None)


def format_cell(measured: float | None, printed: float | None, digits: int = 2) -> str:
    """Format a cell as ``93.50 (93.79, -0.29)``: measured, printed, difference.

    Args:
        measured: measured figure, if any.
        printed: the paper's figure, if any.
        digits: decimal places.
    """
    if measured is None:
        return "" if printed is None else f"({printed:,.{digits}f})"
    if printed is None:
        return f"{measured:,.{digits}f}"
    return f"{measured:,.{digits}f} ({printed:,.{digits}f}, {measured - printed:+,.{digits}f})"
