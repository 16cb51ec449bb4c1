"""Commands that bring faces of their own, or list them: align, demo, pairs."""

from __future__ import annotations

from pathlib import Path

import click

import qface
from qface.cli.command import Command, show, written
from qface.cli.options import FilePath, json_option, people_option

__all__ = ["align", "demo", "pairs"]


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
@click.option("-o", "--output", required=True, type=FilePath, help="Folder of crops to write.")
@click.option(
    "--landmarks",
    type=FilePath,
    help="Lines 'file x1 y1 ... x5 y5' in pixels, or what mtcnn found.  [default: look for faces]",
)
@click.option("--detector", type=FilePath, help="ONNX file of SCRFD or YuNet.  [default: uniface's RetinaFace]")
@json_option
def align(photos: Path, output: Path, landmarks: Path | None, detector: Path | None, as_json: bool) -> None:
    """Cut aligned 112x112 crops from PHOTOS, a folder; what is there already is kept."""
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
@click.option("-o", "--output", required=True, type=FilePath, help="List of pairs to write.")
@people_option
@click.option("--folds", type=int, default=10, help="Folds, which share no people.")
@click.option("--pairs-per-fold", type=int, default=300, help="Pairs of one person in a fold, and as many of two.")
@click.option("--seed", type=int, default=0, help="Seed of the draw.")
@json_option
def pairs(
    images: Path, output: Path, identities: str | None, folds: int, pairs_per_fold: int, seed: int, as_json: bool
) -> None:
    """Draw a balanced list of pairs for evaluate --pairs from IMAGES, a folder with one subfolder a person."""
    drawn = qface.make_pairs(images, output, identities, folds, pairs_per_fold, seed)
    genuine = int(drawn.same.sum())
    record = {"folds": folds, "genuine_pairs": genuine, "impostor_pairs": len(drawn) - genuine}
    show({**written(output), **record}, f"wrote {output}: {len(drawn)} pairs in {folds} folds", as_json)


@click.command(
    cls=Command,
    examples=(
        "qface demo",
        "qface demo -o /tmp/demo --seed 1 --json",
    ),
)
@click.option("-o", "--output", type=FilePath, default=Path("runs/demo"), help="Folder for its files.")
@click.option("--seed", type=int, default=0, help="Seed of training.")
@json_option
def demo(output: Path, seed: int, as_json: bool) -> None:
    """Do the whole job on 400 real faces: train a small teacher, quantize, distill, export, evaluate."""
    from qface.demo import run_demo
    from qface.reporting import demo_table

    report = run_demo(output, seed)
    show(report.to_dict(), demo_table(report), as_json)
