"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from qface.demo import DemoReport
from qface.deployment import Agreement
from qface.deployment.latency import Latency
from qface.evaluation import EvaluationResult

__all__ = ["agreement_table", "demo_table", "evaluation_table", "latency_table"]


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


def agreement_table(agreement: Agreement) -> Table:
    """Student against file: the embeddings, and each layer that differs anywhere."""
    verdict = "agree" if agreement.agrees else "DO NOT AGREE"
    table = Table(title=f"student and file {verdict}: {len(agreement.layers)} layers, {agreement.images} images")
    table.add_column("compared")
    table.add_column("result", justify="right")
    table.add_row("embeddings, mean cosine", f"{agreement.mean_cosine:.7f}")
    table.add_row("embeddings, least cosine", f"{agreement.least_cosine:.7f}")
    different = sum(layer.different for layer in agreement.layers)
    table.add_row("integers that differ", f"{different} of {sum(layer.elements for layer in agreement.layers)}")
    for layer in agreement.layers:
        if layer.different:
            table.add_row(layer.layer, f"{layer.different} of {layer.elements}, by up to {layer.greatest_step}")
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


def latency_table(comparisons: Sequence[Sequence[Latency]], title: str) -> Table:
    """A row a network, under a line for each comparison; ratios are to the first row below it."""
    table = Table(title=title, box=box.SIMPLE)
    for name in ("network", "provider", "median ms", "min ms", "ratio", "MB", "MiB", "load s"):
        table.add_column(name, justify="left" if name in ("network", "provider") else "right")
    for rows in comparisons:
        table.add_section()
        table.add_row(f"[bold]{counted(rows[0].threads, 'thread')}, {counted(rows[0].batch, 'image')} a call")
        for row in rows:
            figures = (row.median, row.minimum, row.ratio, row.megabytes, row.mebibytes, row.load_seconds)
            table.add_row(row.name, row.provider, *(f"{figure:.2f}" for figure in figures))
    return table


def counted(count: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
