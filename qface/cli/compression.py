"""The command compress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import CALIBRATION_IMAGES, DistillName
from qface.cli.command import Command, note, show
from qface.cli.model_card import card_option, write_card
from qface.cli.options import (
    FilePath,
    distill_config,
    images_option,
    json_option,
    preprocessing_options,
    training_options,
)
from qface.cli.resumable import continued

__all__ = ["compress"]

_LIMITS = ("max_drop", "max_mb", "max_ms", "stress", "at_fpr", "confidence")


@click.command(
    cls=Command,
    examples=(
        "qface compress teacher.onnx --images faces/ --bits 6 -o small.onnx",
        "qface compress teacher.onnx --images faces/ --max-drop 0.5 --at-fpr 1e-4 -o small.onnx",
        "qface compress teacher.safetensors --images faces/ --max-mb 0.6 --distill never -o small.onnx",
    ),
)
@click.argument("model")
@images_option
@click.option(
    "--bits", type=int, help="Bits of weights and activations, 2 to 8, instead of a search.  [default: search]"
)
@click.option("--weight-bits", type=int, help="Bits of weights alone, instead of a search.  [default: --bits]")
@click.option("--activation-bits", type=int, help="Bits of activations alone, 2 to 8.  [default: --bits, else 8]")
@click.option("--max-drop", type=float, help="Maximum loss of TPR in percentage points.  [default: no limit]")
@click.option("--max-mb", type=float, help="Maximum size of the file in MB (10^6 bytes).  [default: no limit]")
@click.option(
    "--max-ms", type=float, help="Maximum time per image on one thread of this machine, in ms.  [default: no limit]"
)
@click.option(
    "--stress",
    multiple=True,
    metavar="CONDITION",
    help="Keep --max-drop also with changed probes, such as dark or small (see evaluate --stress); repeatable.",
)
@click.option("--at-fpr", default="1e-4", help="FPR of that TPR.")
@click.option(
    "--confidence", type=float, default=0.95, help="One-sided confidence of --max-drop, 0..1, from a bootstrap."
)
@click.option("--people", "identities", help="People to tune on, as for calibrate.  [default: first-half]")
@click.option("--eval-people", "eval_identities", help="Other people to evaluate on.  [default: second-half]")
@click.option("--num-images", type=int, default=CALIBRATION_IMAGES, help="Images to calibrate on, mirrored if few.")
@click.option(
    "--distill",
    type=click.Choice(get_args(DistillName)),
    default="if-needed",
    help="When to train. if-needed: at fixed bits, without --max-drop, or if calibration misses it; for-size: also to "
    "make the file smaller.",
)
@click.option("--prune/--no-prune", default=False, help="Remove channels if --max-ms needs it.")
@training_options
@click.option(
    "--run-dir", type=FilePath, help="Folder of all trials; the same command continues there.  [default: OUTPUT.run]"
)
@click.option("-o", "--output", required=True, type=FilePath, help="File to write (.onnx).")
@card_option
@preprocessing_options
@json_option
def compress(
    model: str,
    images: Path,
    bits: int | None,
    weight_bits: int | None,
    activation_bits: int | None,
    identities: str | None,
    eval_identities: str | None,
    num_images: int,
    distill: DistillName,
    prune: bool,
    run_dir: Path | None,
    output: Path,
    card: bool,
    preprocessing: dict[str, Any],
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize, calibrate, distill and export MODEL to an ONNX file, and evaluate it on other people.

    Give --bits for one file with these bits, or at least one of --max-drop, --max-mb and --max-ms to search for the
    smallest file within these limits. Half of the people tune, the other half evaluate. Exit code 1 means that no file
    meets the limits; then no file is written.
    """
    from qface.models.resolve import resolve_model

    target = qface.CompressionTarget(**{name: options.pop(name) for name in _LIMITS})
    config = qface.CompressConfig(
        weight_bits=bits if weight_bits is None else weight_bits,
        activation_bits=_first_given(activation_bits, bits, 8),
        distill=distill,
        prune=prune,
        calibration=qface.CalibrationConfig(num_images),
        training=distill_config(**options),
    )
    teacher = resolve_model(model, preprocessing=preprocessing)
    with continued():
        found = qface.compress(teacher, images, output, target, config, identities, eval_identities, run_dir)
    show(found.to_dict(), found, as_json)
    if found.chosen is None:
        note(f"no file was written: {found.stopped}; the trials are in {found.run_dir}")
        raise click.exceptions.Exit(1)
    note(f"wrote {output} ({found.chosen.mb:.2f} MB): {found.stopped}")
    if card:
        write_card(output, found.figures())


def _first_given(*values: int | None) -> int:
    return next(value for value in values if value is not None)
