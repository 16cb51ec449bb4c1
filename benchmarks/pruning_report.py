"""Table and figure of pruned and quantized networks.

    python benchmarks/pruning_report.py docs/results/pruning_mobilefacenet.json [--figure pruning.png]

prints the table of a JSON file of pruning.py again, and draws its figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import click
from harness.benchmark_command import BenchmarkCommand
from harness.records import Record
from harness.report_files import markdown_table, terminal_table, write_figure
from rich.console import Console
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
    """Plot lost TPR over size and speedup: a color per bits, filled markers if distilled, a marker per ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    best = rows[0]["tpr"]["1e-4"]
    drawn = _lines(rows)
    colors = {bits: f"C{number}" for number, bits in enumerate(dict.fromkeys(bits for bits, _ in drawn))}
    markers = dict(zip(sorted({row["ratio"] or 0 for row in rows}), cycle(_MARKERS), strict=False))
    for (bits, trained), line in drawn.items():
        lost = [100 * (best - row["tpr"]["1e-4"]) for row in line]
        look = _look(colors[bits], trained)
        for panel, key, scale in zip(panels, ("bytes", "speedup"), (1e-6, 1), strict=True):
            places = [row[key] * scale for row in line]
            panel.plot(places, lost, color=look["color"], linestyle=look["linestyle"])
            for row, place, height in zip(line, places, lost, strict=True):
                panel.plot(place, height, marker=markers[row["ratio"] or 0], **look)
    panels[0].set(xlabel="MB", ylabel="points of TPR at FPR 1e-4 lost", xscale="log", yscale="symlog")
    panels[1].set(xlabel="times as fast as float", xscale="log")
    for panel in panels:
        panel.grid(linewidth=0.3)
        _plain_ticks(panel.xaxis)
    panels[0].set_ylim(bottom=-0.5)
    panels[0].set_yticks([0, 1, 2, 5, 10, 20, 50], minor=False)
    panels[0].yaxis.set_major_formatter("{x:g}")
    figure.suptitle(network, fontsize="medium")
    _add_legend(figure, {key: _look(colors[key[0]], key[1]) for key in drawn}, markers)
    write_figure(path, figure)


_MARKERS = "osD^vP*X"
"""Markers of the ratios, in their order."""


def _look(color: str, trained: bool) -> Record:
    """Return the style of a line and its markers; hollow ones are larger, so that equal points show both."""
    fill = {"markersize": 5} if trained else {"markersize": 8, "markerfacecolor": "none"}
    return {"color": color, "linestyle": "-" if trained else "--", **fill}


def _add_legend(figure: Any, looks: dict[tuple[Bits | None, bool], Record], markers: dict[float, str]) -> None:
    """Explain lines and markers below the panels, where they cover no point."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D(
            [], [], marker="o", label=f"{name_of(bits) if bits else 'float'}{', distilled' if trained else ''}", **look
        )
        for (bits, trained), look in looks.items()
    ]
    shapes = [
        Line2D([], [], color="0.3", linestyle="", marker=marker, label=f"{ratio:.0%} pruned" if ratio else "not pruned")
        for ratio, marker in markers.items()
    ]
    columns = -(-(len(lines) + len(shapes)) // len(shapes))  # the shapes are the last column
    figure.legend(
        handles=[*lines, *shapes], loc="outside lower center", ncols=columns, fontsize="small", handlelength=3
    )


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


@click.command(cls=BenchmarkCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--figure", type=click.Path(path_type=Path), help="Write a plot of loss over size and speed to this file."
)
def main(file: Path, figure: Path | None) -> None:
    """Print the table of FILE, the JSON of pruning.py."""
    network, rows = _read(file)
    Console(width=max(Console().width, 160)).print(table(network, rows))
    if figure is not None:
        draw(network, rows, figure)


def _read(file: Path) -> tuple[str, list[Record]]:
    """Return the network and the rows in a JSON file of pruning.py."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        rows = [{**row, "bits": None if row["bits"] is None else tuple(row["bits"])} for row in report["rows"]]
        return report["network"], rows
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{file} must be a JSON file of pruning.py: {error!r}") from error


if __name__ == "__main__":
    main()
