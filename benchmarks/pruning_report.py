"""Table and figure of pruned and quantized networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.records import Record
from harness.report_files import markdown_table, terminal_table, write_figure
from rich.table import Table

Bits = tuple[int, int]
"""Bits of weights and of activations."""


def name_of(bits: Bits) -> str:
    """Return a name such as ``w4a8``."""
    return "w{}a{}".format(*bits)


def gain_per_macs(row: Record, rows: Sequence[Record]) -> float | None:
    """Return the speedup by pruning, at the same bits, relative to the reduction in multiply-adds.

    It is 1 if the time is proportional to the multiply-adds.
    """
    if row["ratio"] is None:
        return None
    whole = next(other for other in rows if other["ratio"] is None and other["bits"] == row["bits"])
    gain: float = (row["speedup"] / whole["speedup"]) * (row["macs"] / whole["macs"])
    return gain


HEADINGS = (
    *("", "TPR at 1e-4", "lost", "1e-3", "against a float gallery", "LFW 10-fold", "1 - cosine"),
    *("million MACs", "MB", "times as fast", "of the products saved"),
)


def table(network: str, rows: Sequence[Record]) -> Table:
    """Return the table for the terminal, one row per file."""
    return terminal_table(f"{network}, second half of the people", HEADINGS, _cells(rows))


def markdown(rows: Sequence[Record]) -> str:
    """Return the same table as Markdown."""
    return markdown_table(HEADINGS, _cells(rows))


def _cells(rows: Sequence[Record]) -> Iterable[list[str]]:
    best = rows[0]["tpr"]["1e-4"]
    for row in rows:
        rate = row["tpr"]["1e-4"]
        lost = None if rate is None or best is None else best - rate
        shares = (rate, lost, row["tpr"]["1e-3"], row["gallery_tpr"]["1e-4"], row["accuracy"])
        costs = (f"{row['macs'] / 1e6:,.0f}", f"{row['bytes'] / 1e6:.2f}", f"{row['speedup']:.2f}")
        gain = row["gain_per_macs"]
        share = "" if gain is None else f"{gain:.0%}"
        yield [_words(row), *map(_points, shares), f"{row['distance']:.4f}", *costs, share]


def _words(row: Record) -> str:
    """Return the steps that the network went through, in their order."""
    done = []
    if row["ratio"] is not None:
        done.append(f"{row['ratio']:.0%} pruned")
        done.append("repaired" if row["repaired"] else "not repaired")
    if row["ratio"] is not None and row["trained"]:
        done.append("distilled")
    if row["bits"] is not None:
        done.append(name_of(row["bits"]))
        done += ["distilled"] if row["trained"] else []
    return ", ".join(done) or "float"


def _points(share: float | None) -> str:
    """Return a fraction as percent."""
    return "-" if share is None else f"{100 * share:.2f}"


def draw(network: str, rows: Sequence[Record], path: Path) -> None:
    """Plot lost TPR over size and speedup: one color per bits, dashed lines if not distilled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    best = rows[0]["tpr"]["1e-4"]
    drawn = _lines(rows)
    colors = {bits: f"C{number}" for number, bits in enumerate(dict.fromkeys(bits for bits, _ in drawn))}
    for (bits, trained), line in drawn.items():
        label = f"{'float' if bits is None else name_of(bits)}{', distilled' if trained else ''}"
        lost = [100 * (best - row["tpr"]["1e-4"]) for row in line]
        for panel, key, scale in zip(panels, ("bytes", "speedup"), (1e-6, 1), strict=True):
            places = [row[key] * scale for row in line]
            panel.plot(places, lost, "o-" if trained else "o--", color=colors[bits], label=label)
            for row, place, height in zip(line, places, lost, strict=True):
                if row["ratio"] is not None and bits is None:
                    panel.annotate(f" {row['ratio']:.0%}", (place, height), fontsize="small")
    panels[0].set(xlabel="MB", ylabel=f"points of TPR at FPR 1e-4 lost, {network}", xscale="log", yscale="symlog")
    panels[1].set(xlabel="times as fast as float", xscale="log")
    for panel in panels:
        panel.grid(linewidth=0.3)
        _plain_ticks(panel.xaxis)
    panels[0].set_ylim(bottom=-0.5)
    panels[0].set_yticks([0, 1, 2, 5, 10, 20, 50], minor=False)
    panels[0].yaxis.set_major_formatter("{x:g}")
    if drawn:
        panels[0].legend(fontsize="small")
    write_figure(path, figure)


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with numbers such as 0.5, 1 and 2."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _lines(rows: Sequence[Record]) -> dict[tuple[Bits | None, bool], list[Record]]:
    """Group rows by bits and training; the rows of a group differ only in the pruning ratio."""
    found: dict[tuple[Bits | None, bool], list[Record]] = {}
    for row in rows:
        if row["repaired"] and row["tpr"]["1e-4"] is not None:
            found.setdefault((row["bits"], row["trained"]), []).append(row)
    return found
