"""Commands that show what came of a compression: report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qface.cli.command import Command
from qface.cli.options import FilePath, json_option
from qface.compression.run_record import RunRecord
from qface.errors import ConfigError
from qface.reporting.report.report import report as write_report

__all__ = ["report"]

_NEEDED = ("teacher", "student", "file", "images")


@click.command(cls=Command)
@click.argument("run", required=False, type=FilePath)
@click.option("--teacher", help="Instead of RUN: the float network.")
@click.option("--student", help="Instead of RUN: the student (.safetensors).")
@click.option("--file", help="Instead of RUN: the exported file (.onnx).")
@click.option("--images", help="Folder of 112x112 face crops, one folder a person.")
@click.option("--people", "eval_people", help="Which people: first-half, second-half, or a file.  [default: all]")
@click.option("--pairs", help="Pair list, for ten-fold accuracy.")
@click.option("--sensitivity", help="JSON of qface sensitivity --json.")
@click.option("--log", help="log.jsonl of a distillation.")
@click.option("--fpr", default="1e-3", show_default=True, help="FPR at which changed verdicts are looked for.")
@click.option("--faces/--no-faces", default=True, show_default=True, help="Show faces, which are personal data.")
@click.option("--latency-runs", type=int, default=40, show_default=True, help="Timed calls of each file; 0 for none.")
@click.option(
    "--bootstrap", type=int, default=200, show_default=True, help="Replicates for the curves' confidence; 0 for none."
)
@click.option("-o", "--output", required=True, type=FilePath, help="Page to write (.html).")
@json_option
def report(
    run: Path | None,
    fpr: str,
    faces: bool,
    latency_runs: int,
    bootstrap: int,
    output: Path,
    as_json: bool,
    **fields: Any,
) -> None:
    """Write a page on one compression: accuracy before and after, size, latency, agreement.

    RUN is a run folder of qface compress; without one, give --teacher, --student, --file and --images.
    """
    data = write_report(_record(run, fields), output, fpr, faces, latency_runs, bootstrap=bootstrap)
    click.echo(json.dumps(data.to_dict()) if as_json else f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")


def _record(run: Path | None, fields: Mapping[str, Any]) -> RunRecord:
    given = {name: value for name, value in fields.items() if value is not None}
    if run is not None:
        if given:
            option = next(iter(given)).removeprefix("eval_")
            raise ConfigError(f"{run} says what was compressed: leave out --{option}, or the run folder")
        return RunRecord.read(run)
    missing = [f"--{name}" for name in _NEEDED if name not in given]
    if missing:
        raise ConfigError(f"give a run folder, or also {', '.join(missing)}")
    return RunRecord(**given)
