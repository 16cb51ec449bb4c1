"""The command compress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import DistillName
from qface.cli.command import Command, note, show
from qface.cli.model_card import card_option, write_card
from qface.cli.options import FilePath, images_option, json_option, preprocessing_options

__all__ = ["compress"]


@click.command(
    cls=Command,
    examples=(
        "qface compress teacher.onnx --images faces/ --max-drop 0.5 --at-fpr 1e-4 -o small.onnx",
        "qface compress teacher.safetensors --images faces/ --max-mb 0.6 --distill never -o small.onnx",
    ),
)
@click.argument("model")
@images_option
@click.option("--max-drop", type=float, help="TPR that the file may lose, in percentage points.  [default: no limit]")
@click.option("--at-fpr", default="1e-4", help="False-positive rate of that TPR.")
@click.option("--max-mb", type=float, help="Maximum size of the file in MB (10^6 bytes).  [default: no limit]")
@click.option(
    "--max-ms", type=float, help="Maximum time of one image on one thread of this machine, in ms.  [default: no limit]"
)
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    help="One-sided confidence, 0..1, over people, with which --max-drop is kept.",
)
@click.option("--people", "identities", help="People to tune on, as for quantize.  [default: first-half]")
@click.option("--eval-people", "eval_identities", help="Other people to judge on.  [default: second-half]")
@click.option("--activation-bits", type=int, default=8, help="Bits of activations, 2 to 8.")
@click.option(
    "--distill",
    type=click.Choice(get_args(DistillName)),
    default="if-needed",
    help="Train only where calibration misses the target, or also for a smaller file, or never.",
)
@click.option("--prune/--no-prune", default=False, help="Remove channels where --max-ms needs it.")
@click.option("--epochs", type=int, default=1, help="Rounds of training, where there is any.")
@click.option(
    "--run-dir", type=FilePath, help="Folder of all trials; the same command goes on there.  [default: OUTPUT.run]"
)
@click.option("-o", "--output", required=True, type=FilePath, help="File to write (.onnx).")
@card_option
@preprocessing_options
@json_option
def compress(
    model: str,
    images: Path,
    identities: str | None,
    eval_identities: str | None,
    activation_bits: int,
    distill: Any,
    prune: bool,
    epochs: int,
    run_dir: Path | None,
    output: Path,
    card: bool,
    preprocessing: dict[str, Any],
    as_json: bool,
    **target: Any,
) -> None:
    """Write the smallest ONNX file of MODEL that keeps a target, and say what was tried.

    Give at least one of --max-drop, --max-mb and --max-ms. Half of the people tune, the other half judge. Exit code 1
    means that no file keeps the target; none is written then.
    """
    from qface.models.resolve import resolve_model

    wanted = qface.CompressionTarget(**target)
    training = qface.DistillConfig(epochs=epochs)
    config = qface.CompressConfig(activation_bits, distill, prune, training=training)
    teacher = resolve_model(model, preprocessing=preprocessing)
    found = qface.compress(teacher, images, output, wanted, config, identities, eval_identities, run_dir)
    show(found.to_dict(), found, as_json)
    if found.chosen is None:
        note(f"no file was written: {found.stopped}; the trials are in {found.run_dir}")
        raise click.exceptions.Exit(1)
    note(f"wrote {output} ({found.chosen.mb:.2f} MB): {found.stopped}")
    if card:
        write_card(output, found.figures())
