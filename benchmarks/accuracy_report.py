"""Summarize accuracy results as figures, a terminal table, Markdown, and a plot of loss over bits.

    python benchmarks/accuracy_report.py docs/results/accuracy_*.json [--figure sweep.png] [--json FILE]

merges JSON files that accuracy.py wrote in several calls or on several machines. If a run is in two files, the last
file on the command line counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
from accuracy_rows import EVERY_ROW, SWEEP, SWEEP_BITS, Goal
from harness.benchmark_command import BenchmarkCommand
from harness.held_out import FPRS
from harness.recipes import RECIPES
from harness.report_files import markdown_table, terminal_table, write_figure, write_json
from rich.console import Console

Record = dict[str, Any]

HEADINGS = (
    *("network", "recipe", "row", "seeds"),
    *(f"TPR at {fpr}" for fpr in FPRS),
    *("lost at 1e-4", "10-fold", "10-fold lost", "lost, float gallery"),
    *("1 - cosine", "weight bits", "MB", "tuning s", "goal"),
)

_SAME_RATE = 1e-3  # TPR of the float network varies this much between machines


def summarize(teachers: dict[str, Record], runs: Iterable[Record]) -> list[Record]:
    """Return means over seeds, losses against float and goals, in points, per network, recipe and row."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for run in runs:
        groups.setdefault((run["network"], run["recipe"], run["row"]), []).append(run)
    lines = {key: _line(key, group, teachers[key[0]]) for key, group in groups.items()}
    for (network, recipe, row), line in lines.items():
        goal = EVERY_ROW[row].goal_of(network) if RECIPES[recipe].judged else Goal()
        line["goals"] = _verdicts(line, goal, lines.get((network, recipe, goal.over)))
    return list(lines.values())


def _line(key: tuple[str, str, str], group: Sequence[Record], teacher: Record) -> Record:
    network, recipe, row = key
    rate, accuracy = _points(teacher["tpr"]["1e-4"]), _points(teacher["accuracy"])
    return {
        "network": network,
        "recipe": recipe,
        "row": row,
        "seeds": len(group),
        "tpr": {fpr: _over_seeds([_points(run["tpr"][fpr]) for run in group]) for fpr in FPRS},
        "tpr_loss": _over_seeds([_minus(rate, _points(run["tpr"]["1e-4"])) for run in group]),
        "accuracy": _over_seeds([_points(run["accuracy"]) for run in group]),
        "accuracy_loss": _over_seeds([_minus(accuracy, _points(run["accuracy"])) for run in group]),
        "gallery_loss": _over_seeds([_minus(rate, _points(run["gallery_tpr"]["1e-4"])) for run in group]),
        "distance": _over_seeds([run["distance"] for run in group]),
        "mean_weight_bits": _over_seeds([run["mean_weight_bits"] for run in group]),
        "mb": _over_seeds([run["bytes"] / 1e6 for run in group]),
        # A resumed training has no duration.
        "seconds": _over_seeds([run["seconds"] for run in group if run["seconds"] is not None]),
    }


def _points(share: float | None) -> float | None:
    """Convert a fraction to percent; None means that there were too few pairs."""
    return None if share is None else 100 * share


def _minus(minuend: float | None, subtrahend: float | None) -> float | None:
    return None if minuend is None or subtrahend is None else minuend - subtrahend


def _over_seeds(values: Sequence[float | None]) -> Record:
    """Return mean and standard deviation; both are None if any value is unknown."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None}


def _verdicts(line: Record, goal: Goal, rival: Record | None) -> list[Record]:
    """Return each goal and its margin in points; a missed goal has a negative margin."""
    verdicts = []
    for name in ("tpr", "accuracy", "gallery"):
        most, lost = asdict(goal)[name], line[f"{name}_loss"]["mean"]
        if most is not None and lost is not None:
            verdicts.append({"goal": f"{name} loss at most {most:g}", "margin": most - lost})
    if goal.gain is not None and rival is not None:
        gain = _minus(rival["tpr_loss"]["mean"], line["tpr_loss"]["mean"])
        if gain is not None:
            verdicts.append({"goal": f"{goal.gain:g} better than {goal.over}", "margin": gain - goal.gain})
    return verdicts


def show(lines: Iterable[Record], teachers: dict[str, Record]) -> None:
    """Print the table, at least 220 columns wide so that no cell wraps."""
    table = terminal_table("Second half of the identities, in percentage points", HEADINGS, _rows(lines, teachers))
    Console(width=max(Console().width, 220)).print(table)


def markdown(lines: Iterable[Record], teachers: dict[str, Record]) -> str:
    """Return the table as Markdown."""
    return markdown_table(HEADINGS, _rows(lines, teachers))


def _rows(lines: Iterable[Record], teachers: dict[str, Record]) -> list[list[str]]:
    rows = [_float_cells(network, teacher) for network, teacher in teachers.items()]
    return rows + [_cells(line) for line in lines]


def _float_cells(network: str, teacher: Record) -> list[str]:
    rates = [_text(_points(teacher["tpr"][fpr])) for fpr in FPRS]
    accuracy = _text(_points(teacher["accuracy"]))
    return [network, "", "float", "", *rates, "", accuracy, *[""] * (len(HEADINGS) - 9)]


def _cells(line: Record) -> list[str]:
    rates = [_spread(line["tpr"][fpr]) for fpr in FPRS]
    losses = [_spread(line[name]) for name in ("tpr_loss", "accuracy", "accuracy_loss", "gallery_loss")]
    digits = {"distance": 4, "mean_weight_bits": 2, "mb": 3, "seconds": 0}
    others = [_text(line[name]["mean"], count) for name, count in digits.items()]
    goals = "; ".join(_verdict(verdict) for verdict in line["goals"])
    return [line["network"], line["recipe"], line["row"], str(line["seeds"]), *rates, *losses, *others, goals]


def _spread(figure: Record) -> str:
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.2f}"
    return f"{_text(figure['mean'])}{deviation}"


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _verdict(verdict: Record) -> str:
    word = "met" if verdict["margin"] >= 0 else "missed"
    return f"{verdict['goal']}: {word} by {abs(verdict['margin']):.2f}"


def draw_sweep(lines: Iterable[Record], path: Path) -> None:
    """Plot the TPR loss at FPR 1e-4 over bits, a panel per network; without matplotlib or sweep rows, write nothing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    curves = _curves(lines)
    if not curves:
        return
    networks = tuple(dict.fromkeys(network for network, _ in curves))
    colors = {recipe: f"C{number}" for number, recipe in enumerate(RECIPES)}
    lowest = min(lost for losses in curves.values() for lost in losses.values())
    figure = Figure(figsize=(1 + 3.6 * len(networks), 4.2), layout="constrained")
    panels = dict(zip(networks, figure.subplots(1, len(networks), sharey=True, squeeze=False)[0], strict=True))
    for (network, kind), losses in curves.items():
        points = zip(*sorted(losses.items()), strict=True)
        panels[network].plot(*points, label=kind.name, color=colors[kind.recipe], **kind.look)
    for network, panel in panels.items():
        panel.set(title=network, xlabel="bits of weights and activations", xticks=SWEEP_BITS)
        panel.set_yscale("symlog", linthresh=1)  # losses span two decades and may be negative
        panel.set_ylim(min(-0.6, lowest - 0.1), 150)
        panel.set_yticks([-0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100], minor=False)
        panel.set_yticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(linewidth=0.3)
    panels[networks[0]].set_ylabel("points of TPR at FPR 1e-4 lost")
    _add_legend(figure, panels.values())
    write_figure(path, figure)


@dataclass(frozen=True)
class _Kind:
    """A recipe, with or without training."""

    recipe: str
    trained: bool

    @property
    def name(self) -> str:
        """Name in the legend."""
        return f"{self.recipe}, {'trained' if self.trained else 'not trained'}"

    @property
    def look(self) -> Record:
        """Style of line and markers; hollow ones are larger, so that equal points show both."""
        hollow = {"linestyle": "--", "markerfacecolor": "none", "markersize": 9}
        return {"marker": "o", **({"markersize": 5} if self.trained else hollow)}


def _add_legend(figure: Any, panels: Iterable[Any]) -> None:
    """Explain each kind once, below the panels, where the legend covers no point."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        handlelength=3,
    )


def _curves(lines: Iterable[Record]) -> dict[tuple[str, _Kind], dict[int, float]]:
    curves: dict[tuple[str, _Kind], dict[int, float]] = {}
    for line in lines:
        row, lost = EVERY_ROW[line["row"]], line["tpr_loss"]["mean"]
        if row.name in SWEEP and lost is not None:
            key = (line["network"], _Kind(line["recipe"], row.trained))
            curves.setdefault(key, {})[row.weight_bits] = lost
    return curves


def combined(reports: Iterable[Record]) -> Record:
    """Merge reports of accuracy.py into one.

    Raises:
        ValueError: the float figures of a network differ, so its images or weights differ.
    """
    teachers: dict[str, Record] = {}
    runs: dict[tuple[Any, ...], Record] = {}
    for report in reports:
        for network, teacher in report["float"].items():
            known = teachers.setdefault(network, teacher)
            apart = (_minus(known["tpr"][fpr], teacher["tpr"][fpr]) for fpr in known["tpr"])
            if any(points is not None and abs(points) > _SAME_RATE for points in apart):
                raise ValueError(f"the files judge {network} by different images or weights")
        runs |= {(run["network"], run["recipe"], run["row"], run["seed"]): run for run in report["runs"]}
    return {"float": teachers, "runs": list(runs.values()), "summary": summarize(teachers, runs.values())}


@click.command(cls=BenchmarkCommand)
@click.argument("files", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1, required=True)
@click.option("--figure", type=click.Path(path_type=Path), help="Write a plot of loss over bits to this file.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(files: Sequence[Path], figure: Path | None, json_file: Path | None) -> None:
    """Print one table of the results in FILES."""
    try:
        report = combined(json.loads(file.read_text(encoding="utf-8")) for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"FILES must be reports of accuracy.py that match: {error}") from error
    show(report["summary"], report["float"])
    if figure is not None:
        draw_sweep(report["summary"], figure)
    if json_file is not None:
        write_json(json_file, report)


if __name__ == "__main__":
    main()
