"""Commands that write or check files: inspect, export, verify, selftest, bench, size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import InputType, RuntimeName, TargetName, WeightFormatName
from qface.cli.command import Command, show, written
from qface.cli.model_card import card_option, write_card
from qface.cli.options import FilePath, images_option, json_option, people_option, preprocessing_options
from qface.errors import ConfigError

__all__ = ["bench", "export", "inspect", "selftest", "size", "verify"]

bits_option = click.option("--bits", type=int, help="Bits to assume for a float network, 2 to 8.  [default: 6]")


def _has_bits(model: str) -> ConfigError:
    return ConfigError(f"{model} is a student and has bits already: leave out --bits")


@click.command(
    cls=Command,
    examples=(
        "qface inspect student.onnx",
        "qface inspect teacher.safetensors --bits 4 --json",
    ),
)
@click.argument("model")
@bits_option
@preprocessing_options
@json_option
def inspect(model: str, bits: int | None, preprocessing: dict[str, Any], as_json: bool) -> None:
    """Describe MODEL, a file or network: its input, bits, processing steps, and integer layers."""
    from qface.reporting.file_description import describe
    from qface.reporting.tables import description_table

    found = describe(model, 6 if bits is None else bits, preprocessing)
    if bits is not None and found.is_student:
        raise _has_bits(model)
    show(found.to_dict(), description_table(found), as_json)


@click.command(
    cls=Command,
    examples=(
        "qface export student.safetensors -o student.onnx",
        "qface export student.safetensors --input uint8 --images faces/ -o camera.onnx",
    ),
)
@click.argument("student")
@click.option("-o", "--output", required=True, type=FilePath, help="File to write (.onnx).")
@click.option(
    "--weight-format",
    type=click.Choice(get_args(WeightFormatName)),
    default="packed",
    help="Layout of a student's weights: packed to their bits, or one byte per weight.",
)
@click.option("--images", type=FilePath, help="Faces to check the file on.  [default: synthetic images]")
@click.option(
    "--input",
    "input_type",
    type=click.Choice(get_args(InputType)),
    default="float32",
    help="Input of the file: normalized floats, or the bytes of RGB images.",
)
@click.option(
    "--target",
    type=click.Choice(get_args(TargetName)),
    default="cpu",
    help="Arithmetic of a student's file: integers for CPUs, fp16 for GPUs, or float32 (fastest in browsers).",
)
@click.option("--normalize", is_flag=True, help="Add an L2 normalization, so that embeddings have length 1.")
@card_option
@json_option
@preprocessing_options
def export(
    student: str,
    output: Path,
    weight_format: WeightFormatName,
    images: Path | None,
    input_type: InputType,
    target: TargetName,
    normalize: bool,
    card: bool,
    as_json: bool,
    preprocessing: dict[str, Any],
) -> None:
    """Write a calibrated STUDENT as an integer ONNX file, or a float network as a float file, and check its outputs."""
    from qface.files import check_folder
    from qface.models.resolve import resolve_model

    check_folder(output)
    network = resolve_model(student, preprocessing=preprocessing)
    qface.export(network, output, weight_format, images, input_type, target, normalize)
    record = written(output)
    show({**record, "input": input_type, "target": target}, f"wrote {output} ({record['bytes'] / 1e6:.2f} MB)", as_json)
    if card:
        write_card(output)


@click.command(
    cls=Command,
    examples=(
        "qface verify student.safetensors student.onnx --images faces/",
        "qface verify student.safetensors student.onnx --images faces/ --people second-half --json",
    ),
)
@click.argument("student")
@click.argument("file", type=FilePath)
@images_option
@people_option
@click.option(
    "--runtime",
    type=click.Choice(get_args(RuntimeName)),
    default="onnxruntime",
    help="Runtime for the file; with openvino (qface[bench]), only embeddings are compared.",
)
@preprocessing_options
@json_option
def verify(
    student: str,
    file: Path,
    images: Path,
    identities: str | None,
    runtime: RuntimeName,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Compare FILE with the STUDENT it was exported from, layer by layer and by embeddings.

    Exit code 1 means that they differ.
    """
    from qface.models.resolve import resolve_model

    network = resolve_model(student, preprocessing=preprocessing)
    agreement = qface.verify(network, file, images, identities, runtime)
    show(agreement.to_dict(), agreement, as_json)
    if not agreement.agrees:
        raise click.exceptions.Exit(1)


@click.command(
    cls=Command,
    examples=(
        "qface selftest student.onnx",
        "qface selftest student.onnx --provider CPUExecutionProvider --json",
    ),
)
@click.argument("file", type=FilePath)
@click.option("--provider", help="Execution provider of onnxruntime.  [default: CPU, or CUDA for a file for GPUs]")
@json_option
def selftest(file: Path, provider: str | None, as_json: bool) -> None:
    """Compare the embeddings of FILE on this machine with the golden values inside it.

    Exit code 1 means that they differ.
    """
    found = qface.selftest(file, None if provider is None else [provider])
    thresholds = qface.thresholds_of(file)
    words = "\n".join(str(each) for each in (found, thresholds) if each is not None)
    show({**found.to_dict(), "thresholds": thresholds and thresholds.to_dict()}, words, as_json)
    if not found.agrees:
        raise click.exceptions.Exit(1)


@click.command(
    cls=Command,
    examples=(
        "qface bench teacher.onnx student.onnx",
        "qface bench teacher.onnx student.onnx --threads 4 --batch 8 --runs 100 --json",
    ),
)
@click.argument("files", type=FilePath, nargs=-1, required=True, metavar="FILE...")
@click.option("--threads", type=int, default=1, help="Threads per operator.")
@click.option("--batch", type=int, default=1, help="Images per call.")
@click.option("--runs", type=int, default=40, help="Timed calls per file.")
@preprocessing_options
@json_option
def bench(
    files: tuple[Path, ...], threads: int, batch: int, runs: int, preprocessing: dict[str, Any], as_json: bool
) -> None:
    """Measure the latency of ONNX files, alternately; ratios are relative to the first file."""
    from qface.deployment.latency import compare, open_file
    from qface.reporting.tables import latency_table

    rows = compare([open_file(file, threads, preprocessing=preprocessing) for file in files], threads, batch, runs)
    show(
        {"rows": [row.to_dict() for row in rows]},
        latency_table(rows, f"{runs} calls of each file, alternately"),
        as_json,
    )


@click.command(
    cls=Command,
    examples=(
        "qface size student.onnx",
        "qface size iresnet18 --bits 4",
    ),
)
@click.argument("model")
@bits_option
@preprocessing_options
@json_option
def size(model: str, bits: int | None, preprocessing: dict[str, Any], as_json: bool) -> None:
    """List what the bytes of a file are used for; MODEL is an .onnx file, or a network whose file size is predicted."""
    from torch import nn

    from qface.graph.queries import is_quantized
    from qface.models.resolve import resolve_architecture

    is_file = model.lower().endswith(".onnx")
    useless = [*preprocessing, *(["bits"] if bits is not None else [])] if is_file else []
    if useless:
        raise ConfigError(f"the size of the file {model} is fixed: leave out --{useless[0]}")
    measured = Path(model) if is_file else resolve_architecture(model, preprocessing=preprocessing)
    if bits is not None and isinstance(measured, nn.Module) and is_quantized(measured):
        raise _has_bits(model)
    report = qface.measure_size(measured, 6 if bits is None else bits)
    show(report.to_dict(), report, as_json)
