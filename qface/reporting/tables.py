"""Results as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from qface.demo import DemoReport
from qface.evaluation import EvaluationResult

__all__ = ["demo_table", "evaluation_table"]


def percent(value: float | None) -> str:
    """``97.95 %``, or ``-`` for what could not be measured."""
    return "-" if value is None else f"{100 * value:.2f} %"


def evaluation_table(result: EvaluationResult) -> Table:
    """One evaluation: counts in the title, a row a figure."""
    table = Table(title=f"{result.images} images of {result.identities} people, {result.runtime}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("threshold", justify="right")
    if result.accuracy is not None and result.accuracy_std is not None:
        figure = f"{percent(result.accuracy)} ± {100 * result.accuracy_std:.2f}"
        table.add_row(f"10-fold accuracy ({result.pairs} pairs, {result.pairs_dropped} dropped)", figure, "")
    for fpr, rate in result.tpr_at_fpr.items():
        threshold = result.thresholds[fpr]
        table.add_row(f"TPR at FPR {fpr}", percent(rate), "-" if threshold is None else f"{threshold:.4f}")
    return table


def demo_table(report: DemoReport) -> Table:
    """Before and after, a row a model."""
    table = Table(title=f"{report.people} people that no model was trained on, {report.images} images, onnxruntime")
    for name in ("model", "accuracy", *(f"TPR at FPR {fpr}" for fpr in report.fprs), "file", "latency"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in report.rows:
        rates = (percent(row.tpr_at_fpr[fpr]) for fpr in report.fprs)
        table.add_row(row.model, percent(row.accuracy), *rates, f"{row.megabytes:.2f} MB", f"{row.milliseconds:.2f} ms")
    return table
