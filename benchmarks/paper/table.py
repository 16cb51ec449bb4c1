"""One of the paper's tables: run what can be run, and print it beside what the paper prints.

    python benchmarks/table1.py [--weights DIR] [--data DIR] [--recipe paper|qface|qface-bf16] [--networks R18] [-o DIR]

paper/rows.py has the printed figures, paper/sources.py says which files are looked for. With the paper's files all rows
of the paper are run; beside them, or without them, its methods on the stand-ins, tuned on the first half of LFW's
people and judged on the second. What a model lost is against its own float network, whatever that was trained on, and
so compares where absolute figures do not. Figures are kept in the output folder, which the five tables share: what one
has measured the others need not, and the same command goes on from there.
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
from rich.console import Console

import qface
from paper.arms import Arms, Unavailable
from paper.rows import FLOAT, SETS, TABLES, PaperTable, Row
from paper.sources import HALF_COLUMNS, STAND_INS, Sources
from qface.files import make_folder

__all__ = ["command"]

_Path = click.Path(path_type=Path)


def command(number: int) -> click.Command:
    """The command line of table ``number``."""

    @click.command(cls=BenchmarkCommand, help=f"Table {number} of Ef-QuantFace: {TABLES[number].title.lower()}.")
    @click.option("--weights", type=_Path, default=Path("../shared/weights"), show_default=True, help="Networks.")
    @click.option("--data", type=_Path, default=Path("../shared/data"), show_default=True, help="Faces.")
    @click.option("--recipe", type=click.Choice(list(RECIPES)), default="qface", show_default=True)
    @click.option("--networks", multiple=True, help="Only these, of R18, R34, R50, R100 and the stand-ins; repeatable.")
    @click.option("--seed", type=int, default=0, show_default=True)
    @click.option("--max-steps", type=click.IntRange(1), help="Of each training.  [default: one epoch]")
    @click.option("-o", "--output", type=_Path, default=Path("runs/paper"), show_default=True)
    @click.option("--json", "json_file", type=_Path, help="Also write all figures here.")
    def main(
        weights: Path,
        data: Path,
        recipe: str,
        networks: Sequence[str],
        seed: int,
        max_steps: int | None,
        output: Path,
        json_file: Path | None,
    ) -> None:
        table = TABLES[number]
        _check_networks(networks, table)
        make_folder(output)
        sources = Sources(weights, data)
        arms = Arms(sources, Records(output), recipe, table.teacher_of, seed, max_steps)
        wanted = [row for row in _rows(table, sources) if not networks or row.network in networks]
        lines: list[Record] = []
        try:
            for row in wanted:
                lines.append(_line(row, arms))
        except KeyboardInterrupt:
            click.echo("interrupted: the same command goes on from here", err=True)
            sys.exit(130)
        finally:
            _report(
                table,
                lines,
                sources.missing(list(dict.fromkeys(row.network for row in table.rows))),
                recipe,
                output,
                json_file,
            )
        if any(line["failed"] for line in lines):
            sys.exit(1)

    return main


def _check_networks(wanted: Sequence[str], table: PaperTable) -> None:
    known = [*dict.fromkeys(row.network for row in table.rows), *STAND_INS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.BadParameter(f"table {table.number} has {', '.join(known)}, not {', '.join(unknown)}")


def _rows(table: PaperTable, sources: Sources) -> list[Row]:
    """The paper's rows, and its methods for each stand-in that is there."""
    stand_ins = [name for name in STAND_INS if sources.network(name) is not None]
    return [*table.rows, *(row for name in stand_ins for row in _methods_for(table, name))]


def _methods_for(table: PaperTable, stand_in: str) -> list[Row]:
    """QuantFace publishes no stand-ins, and of those in a table of distillation only the smaller one learns."""
    learns = not table.teacher_of or stand_in in table.teacher_of
    others = [method for method in table.methods() if learns and method.kind not in ("float", "published")]
    return [Row(stand_in, method.name, method) for method in (FLOAT, *others)]


def _line(row: Row, arms: Arms) -> Record:
    """What the paper prints of a row, and what came of it here."""
    click.echo(f"{row.network}, {row.label} ({row.method.name})", err=True)
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
    """What the paper prints for the float network that a model was made of; it is not that of others' models."""
    if row.method.kind not in ("ours", "pruned"):
        return {}
    floats = (each for each in TABLES[1].rows if each.method.kind == "float")
    return next((each.printed for each in floats if each.network == row.network), {})


def _lost(row: Row, figures: Record, teacher: Record) -> float | None:
    """Points of TPR at FPR 1e-4 that the float network is ahead."""
    if row.method.kind == "float":
        return None
    ahead, behind = _at_1e_4(teacher), _at_1e_4(figures)
    return None if ahead is None or behind is None else ahead - behind


def _at_1e_4(figures: Record) -> float | None:
    """TPR at FPR 1e-4, on whichever images it was measured."""
    columns = ("ijbc-1e-4", HALF_COLUMNS["1e-4"])
    return next((value for column in columns if (value := figures.get(column)) is not None), None)


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
    """The columns of figures that any row has, by their keys."""
    known = {**SETS, **{heading: heading for heading in HALF_COLUMNS.values()}}
    used = {key for line in lines for key in (*line["measured"], *line["printed"])}
    return {key: heading for key, heading in known.items() if key in used}


def _headings(lines: Sequence[Record]) -> list[str]:
    return ["network", "model", "method", "images", "MB", *_columns(lines).values(), "lost at 1e-4", "seconds", ""]


def _cells(line: Record, columns: dict[str, str]) -> list[str]:
    measured, printed = line["measured"], line["printed"]
    figures = [_cell(measured.get(key), printed.get(key)) for key in columns]
    images = _cell(measured.get("images"), printed["images"], digits=0)
    size = _cell(measured.get("mb"), printed["mb"])
    lost = _cell(measured.get("lost"), printed["lost"])
    seconds = "" if measured.get("seconds") is None else f"{measured['seconds']:.0f}"
    last = line["missing"] or ("see below" if line["remark"] else "")
    return [line["network"], line["label"], line["method"], images, size, *figures, lost, seconds, last]


def _cell(measured: float | None, printed: float | None, digits: int = 2) -> str:
    """``93.50 (93.79, -0.29)``; either may be missing."""
    if measured is None:
        return "" if printed is None else f"({printed:,.{digits}f})"
    if printed is None:
        return f"{measured:,.{digits}f}"
    return f"{measured:,.{digits}f} ({printed:,.{digits}f}, {measured - printed:+,.{digits}f})"


def _remarks(lines: Sequence[Record]) -> list[str]:
    return [f"{line['network']}, {line['label']}: {line['remark']}." for line in lines if line["remark"]]


def _markdown(headings: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    return markdown_table(headings, cells) + "\n" + "".join(f"- {note}\n" for note in notes)


def _draw(table: PaperTable, lines: Sequence[Record], path: Path) -> None:
    """TPR at 1e-4, measured and printed, a row a model; nothing without matplotlib or figures."""
    marks: dict[str, Callable[[Record], Any]] = {
        "measured": lambda line: _at_1e_4(line["measured"]),
        "printed": lambda line: _at_1e_4(line["printed"]),
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
