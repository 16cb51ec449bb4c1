"""Commands that show the results of a compression: report, plot, tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import FigureKind
from qface.cli.command import Command, show, written
from qface.cli.options import FilePath, json_option, preprocessing_options
from qface.cli.resumable import continued_in
from qface.errors import ConfigError

__all__ = ["plot", "report", "tensorboard"]

_NEEDED = ("teacher", "student", "file", "images")


@click.command(
    cls=Command,
    examples=(
        "qface report small.run -o report.html",
        "qface report --teacher t.onnx --student s.safetensors --file s.onnx --images faces/ -o report.html",
        "qface report small.run --stress --run-dir small.run/report -o report.html",
    ),
)
@click.argument("run", required=False, type=FilePath)
@click.option("--teacher", help="Float network, instead of RUN.  [default: RUN's]")
@click.option("--student", help="Student (.safetensors), instead of RUN.  [default: RUN's]")
@click.option("--file", help="Exported file (.onnx), instead of RUN.  [default: RUN's]")
@click.option("--images", help="Folder of 112x112 face crops, one subfolder per person.  [default: RUN's]")
@click.option(
    "--people", "eval_people", help="People to evaluate on: first-half, second-half, or a file.  [default: all]"
)
@click.option("--pairs", help="Pair list, for ten-fold accuracy.  [default: none]")
@click.option("--sensitivity", help="JSON file of qface sensitivity --json.  [default: none]")
@click.option("--log", help="log.jsonl of a distillation.  [default: none]")
@click.option("--fpr", default="1e-3", help="FPR of the threshold for changed decisions.")
@click.option("--faces/--no-faces", default=True, help="Show faces, which are personal data.")
@click.option("--latency-runs", type=int, default=40, help="Timed calls per file; 0 for none.")
@click.option("--bootstrap", type=int, default=200, help="Bootstrap replicates for the confidence bands; 0 for none.")
@click.option("--stress", is_flag=True, help="Also compare both models on misaligned, small, dark and covered faces.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to store embeddings in; a stopped report continues there.  [default: none]",
)
@click.option("-o", "--output", required=True, type=FilePath, help="Page to write (.html).")
@preprocessing_options
@json_option
def report(
    run: Path | None,
    fpr: str,
    faces: bool,
    latency_runs: int,
    bootstrap: int,
    stress: bool,
    run_dir: Path | None,
    output: Path,
    preprocessing: dict[str, Any],
    as_json: bool,
    **fields: Any,
) -> None:
    """Write an HTML page on one compression: accuracy before and after, size, latency, agreement.

    RUN is a run folder of qface compress; without one, give --teacher, --student, --file and --images.
    """
    with continued_in(run_dir):
        data = qface.report(
            _record(run, fields),
            output,
            fpr,
            faces,
            latency_runs,
            bootstrap=bootstrap,
            preprocessing=preprocessing,
            stress=stress,
            run_dir=run_dir,
        )
    show(data.to_dict(), f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)", as_json)


def _record(run: Path | None, fields: Mapping[str, Any]) -> qface.RunRecord:
    given = {name: value for name, value in fields.items() if value is not None}
    if run is not None:
        if given:
            option = next(iter(given)).removeprefix("eval_")
            raise ConfigError(f"{run} has all inputs already: leave out --{option}, or the run folder")
        return qface.RunRecord.read(run)
    missing = [f"--{name}" for name in _NEEDED if name not in given]
    if missing:
        raise ConfigError(f"give a run folder, or add {', '.join(missing)}")
    return qface.RunRecord(**given)


@click.command(
    cls=Command,
    examples=(
        "qface plot roc report.json -o roc.svg",
        "qface plot size student.onnx -o size.png",
        "qface plot training run/ -o training.svg",
    ),
)
@click.argument("kind", type=click.Choice(get_args(FigureKind)))
@click.argument("source", metavar="INPUT", type=FilePath)
@click.option("-o", "--output", required=True, type=FilePath, help="File to write (.svg, .png or .pdf).")
@json_option
def plot(kind: FigureKind, source: Path, output: Path, as_json: bool) -> None:
    """Draw one figure of a report.

    INPUT is an exported file for size, log.jsonl or its run folder for training, and otherwise the output of
    qface report --json.
    """
    show(written(qface.plot(kind, source, output)), f"wrote {output}", as_json)


@click.command(
    cls=Command,
    examples=(
        "qface tensorboard run/ -o events/first",
        "qface tensorboard small.run -o events/small --json",
    ),
)
@click.argument("source", metavar="RUN", type=FilePath)
@click.option("-o", "--output", required=True, type=FilePath, help="Folder for the event file, one per run.")
@json_option
def tensorboard(source: Path, output: Path, as_json: bool) -> None:
    """Write a training log as an event file of TensorBoard.

    RUN is the run folder of qface distill or qface compress, or its log.jsonl.
    """
    file = qface.write_tensorboard(source, output)
    show(written(file), f"wrote {file}", as_json)
