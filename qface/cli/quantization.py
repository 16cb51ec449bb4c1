"""Commands that make a student without training: quantize, calibrate, allocate-bits."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

import qface
from qface.choices import CALIBRATION_IMAGES, SENSITIVITY_IMAGES
from qface.cli.command import Command, note, show, written
from qface.cli.options import (
    FilePath,
    images_option,
    json_option,
    people_option,
    preprocessing_options,
    run_dir_option,
    weights_option,
)
from qface.cli.resumable import run_of
from qface.errors import ConfigError

__all__ = ["allocate_bits", "calibrate", "quantize"]


@click.command(
    cls=Command,
    examples=(
        "qface quantize teacher.onnx --bits 6 -o student.safetensors",
        "qface quantize iresnet18 --weights r18.pth --weight-bits 4 --activation-bits 8 -o student.safetensors",
        "qface quantize teacher.onnx --config bits.json -o student.safetensors",
    ),
)
@click.argument("model")
@weights_option
@click.option("--bits", type=int, help="Bits of weights and activations, 2 to 8.  [default: 6]")
@click.option("--weight-bits", type=int, help="Bits of weights alone, 2 to 8.  [default: --bits]")
@click.option("--activation-bits", type=int, help="Bits of activations alone, 2 to 8.  [default: --bits]")
@click.option("--config", "file", type=FilePath, help="JSON file of qface allocate-bits.  [default: --bits]")
@click.option(
    "--ignored-layers", multiple=True, help="Layer that stays in float, or a pattern such as 'layer4.*'; repeatable."
)
@click.option("-o", "--output", required=True, type=FilePath, help="Student file to write (.safetensors).")
@json_option
@preprocessing_options
def quantize(
    model: str,
    weights: Path | None,
    file: Path | None,
    output: Path,
    as_json: bool,
    preprocessing: dict[str, Any],
    **bits: Any,
) -> None:
    """Insert quantizers into a float network. Run qface calibrate next.

    MODEL is a file, package.module:factory, or with --weights a name such as iresnet18.
    """
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file

    check_model_file(output)
    config = _config(**bits) if file is None else _config_of(file, bits)
    student = qface.quantize(resolve_model(model, weights, preprocessing), config)
    qface.save(student, output)
    plan = qface.inspect(student)
    note(plan.summary)
    next_command = shlex.join(["qface", "calibrate", str(output), "--images", "FACES", "-o", str(output)])
    show({**written(output), "integer_share": plan.integer_share}, f"wrote {output}; next: {next_command}", as_json)


def _config(
    bits: int | None, weight_bits: int | None, activation_bits: int | None, ignored_layers: tuple[str, ...]
) -> qface.QuantizationConfig:
    bits = 6 if bits is None else bits
    return qface.QuantizationConfig(
        bits if weight_bits is None else weight_bits,
        bits if activation_bits is None else activation_bits,
        ignored_layers=ignored_layers,
    )


def _config_of(file: Path, options: dict[str, Any]) -> qface.QuantizationConfig:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, ())]
    if given:
        raise ConfigError(f"{file} sets the bits of all layers: leave out {given[0]}, or --config")
    return qface.load_bits(file)


@click.command(
    cls=Command,
    examples=(
        "qface calibrate student.safetensors --images faces/ --people first-half -o student.safetensors",
        "qface calibrate student.safetensors --images faces/ --num-images 64 --no-gptq -o student.safetensors",
    ),
)
@click.argument("student")
@images_option
@people_option
@click.option("--num-images", type=int, default=CALIBRATION_IMAGES, help="Images to calibrate on, mirrored if few.")
@click.option("--batch-size", type=int, default=64, help="Images per forward pass.")
@click.option("--equalize/--no-equalize", default=True, help="Run cross-layer equalization first.")
@click.option("--gptq/--no-gptq", default=True, help="Round weights with GPTQ.")
@click.option("--correct-biases/--no-correct-biases", default=True, help="Run DFQ bias correction last.")
@click.option("-o", "--output", required=True, type=FilePath, help="Student file to write (.safetensors).")
@run_dir_option
@json_option
@preprocessing_options
def calibrate(
    student: str,
    images: Path,
    identities: str | None,
    output: Path,
    run_dir: Path | None,
    as_json: bool,
    preprocessing: dict[str, Any],
    **settings: Any,
) -> None:
    """Set the scales and zero points of STUDENT, a file of qface quantize, from faces."""
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file

    check_model_file(output)
    network: Any = resolve_model(student, preprocessing=preprocessing)
    config = qface.CalibrationConfig(**settings)
    with run_of(output, run_dir, resume=True) as run:
        with run.resumable():
            calibrated = qface.calibrate(network, images, config, identities, run_dir=run.folder)
        qface.save(calibrated, output)
    show(written(output), f"wrote {output}", as_json)


@click.command(
    name="allocate-bits",
    cls=Command,
    examples=(
        "qface allocate-bits teacher.onnx --images faces/ --budget-mb 0.65 -o bits.json",
        "qface allocate-bits teacher.onnx --images faces/ --budget-mb 0.65 --activation-bits 8 -o bits.json --json",
    ),
)
@click.argument("model")
@images_option
@people_option
@click.option("--budget-mb", type=float, required=True, help="Maximum size of the exported file in MB (10^6 bytes).")
@click.option("--activation-bits", type=int, default=6, help="Bits of all activations, 2 to 8.")
@click.option(
    "--num-images", type=int, default=SENSITIVITY_IMAGES, help="Images to measure sensitivity on, evenly spaced."
)
@click.option(
    "-o", "--output", required=True, type=FilePath, help="File to write (.json), for qface quantize --config."
)
@run_dir_option
@json_option
@preprocessing_options
def allocate_bits(
    model: str,
    images: Path,
    identities: str | None,
    budget_mb: float,
    activation_bits: int,
    num_images: int,
    output: Path,
    run_dir: Path | None,
    as_json: bool,
    preprocessing: dict[str, Any],
) -> None:
    """Choose 2 to 8 bits per weight tensor, so that the exported file of MODEL fits a size and loses least."""
    from qface.files import check_folder
    from qface.models.resolve import resolve_model

    check_folder(output)
    network = resolve_model(model, preprocessing=preprocessing)
    with run_of(output, run_dir, resume=True) as run:
        with run.resumable():
            config = qface.allocate_bits(
                network, images, budget_mb, identities, activation_bits, num_images, run_dir=run.folder
            )
        qface.save_bits(config, output)
    record = {"weight_bits": config.weight_bits, "activation_bits": activation_bits, "overrides": len(config.overrides)}
    bits = f"{config.weight_bits} bits per weight, other bits in {len(config.overrides)} layers"
    next_command = shlex.join(["qface", "quantize", model, "--config", str(output), "-o", "student.safetensors"])
    show({**written(output), **record}, f"wrote {output}: {bits}; next: {next_command}", as_json)
