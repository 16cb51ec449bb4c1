"""Run one of the Ef-QuantFace paper's tables, and print each figure next to the paper's.

    python benchmarks/paper_table.py 1 [--weights DIR] [--data DIR] [--recipe paper|qface|qface-bf16] [--networks R18]

``paper/rows.py`` holds the printed figures, ``paper/sources.py`` lists the files that are looked for. With the paper's
files, all rows of the paper run. The paper's methods also run on the stand-in networks, trained on the first half of
LFW's identities and evaluated on the second half. "lost" compares a model with its own float network, so it is
comparable where absolute figures are not. All tables keep their figures in one output folder: a figure that another
table measured is reused, and an interrupted command continues there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from harness.benchmark_command import BenchmarkCommand
from harness.recipes import RECIPES
from harness.records import Record, Records
from harness.report_files import markdown_table, terminal_table, write_figure, write_json, write_text
from paper.arms import Arms
from paper.comparison import compare, format_cell, tpr_at_1e_4
from paper.rows import FLOAT, SETS, TABLES, PaperTable, Row
from paper.sources import HALF_COLUMNS, STAND_INS, Sources
from rich.console import Console

from qface.files import make_folder

__all__ = ["main"]

_Path = click.Path(path_type=Path)


@click.command(cls=BenchmarkCommand)
@click.argument("number", type=click.IntRange(min(TABLES), max(TABLES)))
@click.option("--weights", type=_Path, default=Path("../shared/weights"), show_default=True, help="Folder of networks.")
@click.option("--data", type=_Path, default=Path("../shared/data"), show_default=True, help="Folder of face images.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="qface", show_default=True)
@click.option("--networks", multiple=True, help="Only these: R18, R34, R50, R100 or a stand-in; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-steps", type=click.IntRange(1), help="Steps per training.  [default: one epoch]")
@click.option("-o", "--output", type=_Path, default=Path("runs/paper"), show_default=True)
@click.option("--json", "json_file", type=_Path, help="Also write all figures to this file.")
def main(
    number: int,
    weights: Path,
    data: Path,
    recipe: str,
    networks: Sequence[str],
    seed: int,
    max_steps: int | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Table NUMBER (1 to 5) of Ef-QuantFace, measured next to printed."""
    table = TABLES[number]
    _check_networks(networks, table)
    make_folder(output)
    sources = Sources(weights, data)
    arms = Arms(sources, Records(output), recipe, table.teacher_of, seed, max_steps)
    lines: list[Record] = []
    try:
        for row in _rows(table, sources):
            if not networks or row.network in networks:
                click.echo(f"{row.network}, {row.label} ({row.method.name})", err=True)
                lines.append(compare(row, arms))
    except KeyboardInterrupt:
        click.echo("interrupted: the same command continues from here", err=True)
        sys.exit(130)
    finally:
        missing = sources.missing(list(dict.fromkeys(row.network for row in table.rows)))
        _report(table, lines, missing, recipe, output, json_file)
    if any(line["failed"] for line in lines):
        sys.exit(1)


def _check_networks(wanted: Sequence[str], table: PaperTable) -> None:
    known = [*dict.fromkeys(row.network for row in table.rows), *STAND_INS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.BadParameter(f"table {table.number} has {', '.join(known)}, not {', '.join(unknown)}")


def _rows(table: PaperTable, sources: Sources) -> list[Row]:
    """Return the paper's rows, then its methods for each available stand-in network."""
    stand_ins = [name for name in STAND_INS if sources.network(name) is not None]
    return [*table.rows, *(row for name in stand_ins for row in _methods_for(table, name))]


def _methods_for(table: PaperTable, stand_in: str) -> list[Row]:
    """Return rows for a stand-in, which has no published models; only the smaller one is distilled."""
    learns = not table.teacher_of or stand_in in table.teacher_of
    others = [method for method in table.methods() if learns and method.kind not in ("float", "published")]
    return [Row(stand_in, method.name, method) for method in (FLOAT, *others)]


def _report(
    table: PaperTable,
    lines: Sequence[Record],
    missing: Sequence[str],
    recipe: str,
    output: Path,
    json_file: Path | None,
) -> None:
    headings, cells = _headings(lines), [_cells(line, _columns(lines)) for line in lines]
    title = f"Table {table.number}: {table.title}, recipe {recipe}; measured (printed, difference)"
    notes = [*table.remarks, *_remarks(lines)]
    console = Console(width=max(Console().width, 200))
    console.print(terminal_table(title, headings, cells))
    for note in notes:
        console.print(f"- {note}", markup=False)
    for lack in missing:
        console.print(f"missing: {lack}", markup=False)
    write_text(output / f"table{table.number}.md", _markdown(headings, cells, notes))
    _draw(table, lines, output / f"table{table.number}.png")
    if json_file is not None:
        write_json(json_file, {"table": _as_data(table), "recipe": recipe, "rows": lines, "missing": missing})


def _as_data(table: PaperTable) -> Record:
    return {"number": table.number, "title": table.title, "remarks": table.remarks, "teacher_of": table.teacher_of}


def _columns(lines: Sequence[Record]) -> dict[str, str]:
    """Return the headings of all figures that occur in any row, by key."""
    known = {**SETS, **{heading: heading for heading in HALF_COLUMNS.values()}}
    used = {key for line in lines for key in (*line["measured"], *line["printed"])}
    return {key: heading for key, heading in known.items() if key in used}


def _headings(lines: Sequence[Record]) -> list[str]:
    return ["network", "model", "method", "images", "MB", *_columns(lines).values(), "lost at 1e-4", "seconds", ""]


def _cells(line: Record, columns: dict[str, str]) -> list[str]:
    measured, printed = line["measured"], line["printed"]
    figures = [format_cell(measured.get(key), printed.get(key)) for key in columns]
    images = format_cell(measured.get("images"), printed["images"], digits=0)
    size = format_cell(measured.get("mb"), printed["mb"])
    lost = format_cell(measured.get("lost"), printed["lost"])
    seconds = "" if measured.get("seconds") is None else f"{measured['seconds']:.0f}"
    last = line["missing"] or ("see below" if line["remark"] else "")
    return [line["network"], line["label"], line["method"], images, size, *figures, lost, seconds, last]


def _remarks(lines: Sequence[Record]) -> list[str]:
    return [f"{line['network']}, {line['label']}: {line['remark']}." for line in lines if line["remark"]]


def _markdown(headings: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    return markdown_table(headings, cells) + "\n" + "".join(f"- {note}\n" for note in notes)


def _draw(table: PaperTable, lines: Sequence[Record], path: Path) -> None:
    """Draw TPR at FPR 1e-4 per model, measured and printed, if matplotlib and figures exist."""
    marks: dict[str, Callable[[Record], Any]] = {
        "measured": lambda line: tpr_at_1e_4(line["measured"]),
        "printed": lambda line: tpr_at_1e_4(line["printed"]),
    }
    shown = [line for line in lines if any(read(line) is not None for read in marks.values())]
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    if not shown:
        return
    figure = Figure(figsize=(7, 1 + 0.28 * len(shown)), layout="constrained")
    panel = figure.subplots()
    for marker, (label, read) in zip("ox", marks.items(), strict=True):
        points = [(value, place) for place, line in enumerate(shown) if (value := read(line)) is not None]
        if points:
            panel.scatter(*zip(*points, strict=True), marker=marker, label=label)
    panel.set_yticks(range(len(shown)), [f"{line['network']}, {line['label']}" for line in shown], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("TPR at FPR 1e-4 in percent")
    panel.set_title(f"Table {table.number}: {table.title}", fontsize="medium")
    panel.grid(linewidth=0.3)
    panel.legend(fontsize="small")
    write_figure(path, figure)
