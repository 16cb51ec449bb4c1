"""Table of the comparison with other tools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from harness.held_out import FPRS
from harness.report_files import markdown_table, terminal_table
from rich.console import Console

Record = dict[str, Any]

HEADINGS = (
    *("method", "bits"),
    *(f"lost at {fpr}" for fpr in FPRS),
    *("ten-fold", "cosine to float", "MB", "CPU s", "latency"),
)
SIMULATED = "simulated"
INTERVAL_FPR = "1e-4"
"""FPR of the loss that is shown with its confidence interval."""


def show(rows: Sequence[Record], title: str) -> None:
    """Print the table and the versions of the tools."""
    console = Console(width=max(Console().width, 150))
    console.print(terminal_table(title, HEADINGS, _cells(rows)))
    for line in notes(rows):
        console.print(line, soft_wrap=True)


def markdown(rows: Sequence[Record]) -> str:
    """Return the table and the versions of the tools as Markdown."""
    return markdown_table(HEADINGS, _cells(rows)) + "".join(f"\n{line}\n" for line in notes(rows))


def notes(rows: Sequence[Record]) -> list[str]:
    """Return one line per method and settings, with versions of packages, then one per row that failed."""
    bits: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "figures" in row:
            bits.setdefault((row["method"], _settings(row)), []).append(row["bits"])
    used = [f"{method} {', '.join(each)}".strip() + f": {settings}" for (method, settings), each in bits.items()]
    return [*used, *(f"{row['row']} failed: {row['error']}" for row in rows if "error" in row)]


def _settings(row: Record) -> str:
    versions = (f"{package} {version}" for package, version in row["figures"]["versions"].items())
    options = (f"{name}={value}" for name, value in row["options"].items())
    return ", ".join([*versions, *options])


def _cells(rows: Sequence[Record]) -> list[list[str]]:
    teacher = next((row["figures"] for row in rows if row["method"] == "float" and "figures" in row), None)
    return [_row_cells(row, teacher) for row in rows]


def _row_cells(row: Record, teacher: Record | None) -> list[str]:
    if "error" in row:
        return [row["label"], row["bits"], "failed", *[""] * (len(HEADINGS) - 3)]
    figures = row["figures"]
    rate = _own if row["method"] == "float" else partial(_lost, teacher)
    return [
        row["label"],
        row["bits"],
        *(rate(figures, fpr) for fpr in FPRS),
        f"{100 * figures['accuracy']:.2f}",
        f"{1 - figures['distance']:.4f}",
        SIMULATED if figures["bytes"] is None else f"{figures['bytes'] / 1e6:.2f}",
        "" if figures["cpu_seconds"] is None else f"{figures['cpu_seconds']:.0f}",
        "" if figures["latency_ratio"] is None else f"{figures['latency_ratio']:.2f}",
    ]


def _own(figures: Record, fpr: str) -> str:
    rate = figures["tpr"][fpr]
    return "-" if rate is None else f"TPR {100 * rate:.2f}"


def _lost(teacher: Record | None, figures: Record, fpr: str) -> str:
    if teacher is None or teacher["tpr"][fpr] is None or figures["tpr"][fpr] is None:
        return "-"
    lost = f"{100 * (teacher['tpr'][fpr] - figures['tpr'][fpr]):.2f}"
    if fpr != INTERVAL_FPR or figures["drop_interval"] is None:
        return lost
    low, high = figures["drop_interval"]
    return f"{lost} ({100 * low:.2f} to {100 * high:.2f})"
