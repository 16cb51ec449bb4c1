"""Commands on files: inspect, export, verify, selftest, bench, size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import qface
from qface.cli.command import Command, show
from qface.cli.model_card import card_option, write_card
from qface.cli.options import FilePath, images_option, json_option, people_option, preprocessing_options
from qface.deployment.agreement import RUNTIMES
from qface.deployment.export import TARGETS
from qface.deployment.inputs import INPUTS
from qface.deployment.latency import compare, open_file
from qface.errors import ConfigError
from qface.files import check_folder
from qface.models.resolve import load_file, resolve_architecture
from qface.reporting import agreement_table, latency_table, plan_table
from qface.reporting.tables import size_tables

__all__ = ["bench", "export", "inspect", "selftest", "size", "verify"]


@click.command(cls=Command)
@click.argument("model")
@click.option("--bits", type=int, default=6, show_default=True, help="Bits that a float network would get, 2 to 8.")
@json_option
def inspect(model: str, bits: int, as_json: bool) -> None:
    """Say which layers of MODEL integer kernels would compute, and which would stay in float."""
    plan = qface.inspect(resolve_architecture(model), bits)
    show(plan.to_dict(), plan_table(plan), as_json)


@click.command(cls=Command)
@click.argument("student", type=FilePath)
@click.option("-o", "--output", required=True, type=FilePath, help="File to write (.onnx).")
@click.option(
    "--weight-format",
    type=click.Choice(["packed", "int8"]),
    default="packed",
    show_default=True,
    help="How a student's weights lie in the file: to their bits, or a byte each.",
)
@click.option("--images", type=FilePath, help="Faces to check the file on.  [default: synthetic ones]")
@click.option(
    "--input",
    "input_type",
    type=click.Choice(INPUTS),
    default="float32",
    show_default=True,
    help="What the file reads: normalized floats, or the bytes of RGB images.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="What a student's file is for: integers on CPUs, fp16 on GPUs, or float32 (fastest in browsers).",
)
@click.option("--normalize", is_flag=True, help="Give embeddings unit length, by an L2 normalization at the end.")
@card_option
@preprocessing_options
def export(
    student: Path,
    output: Path,
    weight_format: str,
    images: Path | None,
    input_type: str,
    target: str,
    normalize: bool,
    card: bool,
    preprocessing: dict[str, Any],
) -> None:
    """Write a student as an integer ONNX file (a float network as a float one), and check what it computes."""
    check_folder(output)
    network = load_file(student, preprocessing)
    qface.export(network, output, weight_format, images, input_type, target, normalize)
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")
    if card:
        write_card(output)


@click.command(cls=Command)
@click.argument("student", type=FilePath)
@click.argument("file", type=FilePath)
@images_option
@people_option
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnxruntime",
    show_default=True,
    help="What runs the file; OpenVINO (qface[bench]) is compared from end to end only.",
)
@preprocessing_options
@json_option
def verify(
    student: Path,
    file: Path,
    images: Path,
    identities: str | None,
    runtime: str,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Prove that FILE computes what STUDENT computes, layer by layer and from end to end."""
    agreement = qface.verify(load_file(student, preprocessing), file, images, identities, runtime)
    show(agreement.to_dict(), agreement_table(agreement), as_json)
    if not agreement.agrees:
        raise click.exceptions.Exit(1)


@click.command(cls=Command)
@click.argument("file", type=FilePath)
@click.option("--provider", help="onnxruntime's execution provider.  [default: the CPU; CUDA for a file for GPUs]")
@json_option
def selftest(file: Path, provider: str | None, as_json: bool) -> None:
    """Prove from FILE alone that onnxruntime computes here what was trained."""
    found = qface.selftest(file, None if provider is None else [provider])
    thresholds = qface.thresholds_of(file)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "thresholds": thresholds and thresholds.to_dict()}))
    else:
        click.echo("\n".join(str(each) for each in (found, thresholds) if each is not None))
    if not found.agrees:
        raise click.exceptions.Exit(1)


@click.command(cls=Command)
@click.argument("files", type=FilePath, nargs=-1, required=True, metavar="FILE...")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads within an operation.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images a call.")
@click.option("--runs", type=int, default=40, show_default=True, help="Timed calls of each file.")
@preprocessing_options
@json_option
def bench(
    files: tuple[Path, ...], threads: int, batch: int, runs: int, preprocessing: dict[str, Any], as_json: bool
) -> None:
    """Time ONNX files in turns; the first is what the others are measured by."""
    rows = compare([open_file(file, threads, preprocessing=preprocessing) for file in files], threads, batch, runs)
    show({"rows": [row.to_dict() for row in rows]}, latency_table(rows, f"{runs} calls of each, in turns"), as_json)


@click.command(cls=Command)
@click.argument("model")
@click.option("--bits", type=int, help="Bits that a float network would get, 2 to 8.  [default: 6]")
@preprocessing_options
@json_option
def size(model: str, bits: int | None, preprocessing: dict[str, Any], as_json: bool) -> None:
    """Say what each byte is spent on; MODEL is an .onnx file, or a network whose packed file is predicted."""
    is_file = model.lower().endswith(".onnx")
    useless = [*preprocessing, *(["bits"] if bits is not None else [])] if is_file else []
    if useless:
        raise ConfigError(f"the size of {model}, a file, depends on nothing else; leave out --{useless[0]}")
    measured = Path(model) if is_file else resolve_architecture(model, preprocessing=preprocessing)
    report = qface.measure_size(measured, 6 if bits is None else bits)
    show(report.to_dict(), size_tables(report), as_json)
