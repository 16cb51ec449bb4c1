"""Commands that make face crops or pair lists: align, pairs, synthesize, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import qface
from qface.cli.command import Command, show, written
from qface.cli.options import FilePath, json_option, people_option, preprocessing_options, weights_option

__all__ = ["align", "demo", "pairs", "synthesize"]


@click.command(
    cls=Command,
    examples=(
        "qface align photos/ -o faces/",
        "qface align photos/ --detector det_10g.onnx -o faces/",
        "qface align photos/ --detector face_detection_yunet_2023mar.onnx -o faces/",
        "qface align photos/ --landmarks landmarks.txt -o faces/ --json",
    ),
)
@click.argument("photos", type=FilePath)
@click.option("-o", "--output", required=True, type=FilePath, help="Folder to write the crops to.")
@click.option(
    "--landmarks",
    type=FilePath,
    help="File of lines 'file x1 y1 ... x5 y5' in pixels, or of mtcnn landmarks.  [default: detect faces]",
)
@click.option("--detector", type=FilePath, help="ONNX file of SCRFD or YuNet.  [default: uniface's RetinaFace]")
@json_option
def align(photos: Path, output: Path, landmarks: Path | None, detector: Path | None, as_json: bool) -> None:
    """Cut aligned 112x112 crops from a folder of PHOTOS; existing crops are kept."""
    report = qface.align(photos, output, landmarks, detector)
    show(report.to_dict(), report, as_json)


@click.command(
    cls=Command,
    examples=(
        "qface pairs faces/ -o pairs.txt",
        "qface pairs faces/ --people second-half --folds 10 --pairs-per-fold 100 --seed 1 -o pairs.txt",
    ),
)
@click.argument("images", type=FilePath)
@click.option("-o", "--output", required=True, type=FilePath, help="Pair list to write.")
@people_option
@click.option("--folds", type=int, default=10, help="Number of folds; no person is in two of them.")
@click.option("--pairs-per-fold", type=int, default=300, help="Genuine pairs per fold, and as many impostor pairs.")
@click.option("--seed", type=int, default=0, help="Random seed.")
@json_option
def pairs(
    images: Path, output: Path, identities: str | None, folds: int, pairs_per_fold: int, seed: int, as_json: bool
) -> None:
    """Draw a balanced pair list for evaluate --pairs from IMAGES, a folder with one subfolder per person."""
    drawn = qface.make_pairs(images, output, identities, folds, pairs_per_fold, seed)
    genuine = int(drawn.same.sum())
    record = {"folds": folds, "genuine_pairs": genuine, "impostor_pairs": len(drawn) - genuine}
    show({**written(output), **record}, f"wrote {output}: {len(drawn)} pairs in {folds} folds", as_json)


@click.command(
    cls=Command,
    examples=(
        "qface synthesize teacher.safetensors -o made/",
        "qface synthesize iresnet50 --weights r50.pth --num-images 64 --seed 1 -o made/ --json",
    ),
)
@click.argument("model")
@weights_option
@click.option("-o", "--output", required=True, type=FilePath, help="Folder to write the images to.")
@click.option("--num-images", type=int, default=256, help="Number of images.")
@click.option("--num-steps", type=int, default=120, help="Optimizer steps of each batch.")
@click.option("--batch-size", type=int, default=64, help="Images with common statistics.")
@click.option("--seed", type=int, default=0, help="Random seed.")
@json_option
@preprocessing_options
def synthesize(
    model: str,
    weights: Path | None,
    output: Path,
    num_images: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    as_json: bool,
    preprocessing: dict[str, Any],
) -> None:
    """Make images from the BatchNorm statistics of a float network, for calibrate and distill without faces.

    MODEL is a file, package.module:factory, or with --weights a name such as iresnet18. A stopped command continues.
    """
    from qface.models.resolve import resolve_model

    config = qface.SynthesisConfig(num_images, num_steps, batch_size, seed=seed)
    qface.synthesize(resolve_model(model, weights, preprocessing), output, config)
    show({"output": str(output), "images": num_images}, f"wrote {num_images} images to {output}", as_json)


@click.command(
    cls=Command,
    examples=(
        "qface demo",
        "qface demo -o /tmp/demo --seed 1 --json",
    ),
)
@click.option("-o", "--output", type=FilePath, default=Path("runs/demo"), help="Folder of all files.")
@click.option("--seed", type=int, default=0, help="Seed of training.")
@json_option
def demo(output: Path, seed: int, as_json: bool) -> None:
    """Run all stages on 400 real faces: train a small teacher, quantize, calibrate, distill, export, evaluate."""
    from qface.demo import run_demo
    from qface.reporting.tables import demo_table

    report = run_demo(output, seed)
    show(report.to_dict(), demo_table(report), as_json)
