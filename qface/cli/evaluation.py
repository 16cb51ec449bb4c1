"""Commands that measure networks on faces: evaluate, identify, ijb, thresholds, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.cli.command import Command, embedder, note, show
from qface.cli.options import FilePath, images_option, json_option, people_option, preprocessing_options
from qface.errors import ConfigError
from qface.evaluation import TemplateProtocol
from qface.evaluation.match_thresholds import DEVICE_FPRS
from qface.models.resolve import resolve_model
from qface.reporting import (
    evaluation_table,
    identification_table,
    sensitivity_figure,
    sensitivity_tables,
    stress_table,
    templates_table,
    thresholds_table,
)
from qface.reporting.figures import check_figure

__all__ = ["evaluate", "identify", "ijb", "sensitivity", "thresholds"]


@click.command(cls=Command)
@click.argument("model")
@images_option
@people_option
@click.option("--pairs", type=FilePath, help="Pair list, of LFW for ten-fold accuracy or lines path,path,flag.")
@click.option("--gallery", help="Another model that embeds the gallery, while MODEL embeds the probes.")
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to keep embeddings and counts of pairs in; a run that was stopped goes on there.",
)
@click.option(
    "--bootstrap", type=int, default=0, show_default=True, help="Replicates for 95 % confidence intervals, over people."
)
@click.option(
    "--stress", is_flag=True, help="Measure changed faces instead: ill aligned, turned, small, blurred, dark, covered."
)
@click.option("--reference", help="Of --stress: another model, such as the float network, to compare MODEL with.")
@preprocessing_options
@json_option
def evaluate(
    model: str,
    images: Path,
    identities: str | None,
    pairs: Path | None,
    gallery: str | None,
    flip: bool,
    run_dir: Path | None,
    bootstrap: int,
    stress: bool,
    reference: str | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure verification on faces; MODEL is a student, a float network or an .onnx file."""
    if stress:
        if gallery is not None or flip:
            raise ConfigError("--stress compares changed faces with faces as they are: leave out --gallery and --flip")
        other = None if reference is None else embedder(reference)
        found = qface.evaluate_stress(
            embedder(model, preprocessing), images, pairs, identities, other, bootstrap=bootstrap, run_dir=run_dir
        )
        show(found.to_dict(), stress_table(found), as_json)
        return
    if reference is not None:
        raise ConfigError("--reference is of --stress: give that as well")
    result = qface.evaluate(
        embedder(model, preprocessing),
        images,
        pairs=pairs,
        identities=identities,
        gallery=embedder(gallery) if gallery else None,
        flip=flip,
        run_dir=run_dir,
        bootstrap=bootstrap,
    )
    show(result.to_dict(), evaluation_table(result), as_json)


@click.command(cls=Command)
@click.argument("model")
@images_option
@people_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the images that are enrolled.")
@click.option(
    "--bootstrap", type=int, default=0, show_default=True, help="Replicates for 95 % confidence intervals, over people."
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@preprocessing_options
@json_option
def identify(
    model: str,
    images: Path,
    identities: str | None,
    seed: int,
    bootstrap: int,
    flip: bool,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure 1:N identification with one image of each person enrolled; MODEL as for evaluate."""
    chosen = embedder(model, preprocessing)
    result = qface.evaluate_identification(chosen, images, identities, seed, bootstrap, flip)
    show(result.to_dict(), identification_table(result), as_json)


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", required=True, type=FilePath, help="Folder of IJB-B or IJB-C, with meta/ and loose_crop/.")
@click.option(
    "--protocol",
    type=click.Choice(get_args(TemplateProtocol)),
    default="paper",
    show_default=True,
    help="A template is the mean of its images, or of its photos and videos.",
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option("--detector-score", is_flag=True, help="Weight images by the detector's score.")
@click.option("--run-dir", type=FilePath, help="Folder to keep embeddings in; a run that was stopped goes on there.")
@preprocessing_options
@json_option
def ijb(
    model: str,
    data: Path,
    protocol: TemplateProtocol,
    flip: bool,
    detector_score: bool,
    run_dir: Path | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure 1:1 verification of templates on IJB-B or IJB-C; MODEL as for evaluate."""
    chosen = embedder(model, preprocessing)
    result = qface.evaluate_templates(chosen, data, protocol, flip, detector_score, run_dir)
    show(result.to_dict(), templates_table(result), as_json)


@click.command(cls=Command)
@click.argument("teacher")
@click.argument("student")
@images_option
@click.option("--people", "identities", help="Whom to set thresholds on, as for other commands.  [default: all]")
@click.option("--eval-people", "eval_identities", help="Whom to measure them on.  [default: the same]")
@click.option("--fpr", default="1e-4", show_default=True, help="Share of impostors that may be accepted.")
@click.option(
    "--write",
    "file",
    type=FilePath,
    help="Also measure this .onnx file against itself, at several rates, and write its thresholds into it.",
)
@preprocessing_options
@json_option
def thresholds(
    teacher: str,
    student: str,
    images: Path,
    identities: str | None,
    eval_identities: str | None,
    fpr: str,
    file: Path | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Set the cosine to accept where float meets float, quantized quantized, and quantized a float gallery."""
    if file is not None:
        qface.thresholds_of(file)  # a file that cannot be read is told before any work
    models = (embedder(teacher, preprocessing), embedder(student))
    result = qface.operating_thresholds(*models, images, fpr, identities, eval_identities)
    show(result.to_dict(), thresholds_table(result), as_json)
    if file is not None:
        _write_thresholds(file, images, fpr, identities)


def _write_thresholds(file: Path, images: Path, fpr: str, identities: str | None) -> None:
    fprs = tuple(dict.fromkeys((fpr, *DEVICE_FPRS)))
    measured = qface.match_thresholds(file, images, fprs, identities)
    qface.write_thresholds(file, measured)
    note(f"wrote into {file}: {measured}")


@click.command(cls=Command)
@click.argument("model")
@images_option
@people_option
@click.option("--num-images", type=int, default=64, show_default=True, help="Images to look at, evenly spread.")
@click.option("--run-dir", type=FilePath, help="Folder to keep losses in; a run that was stopped goes on there.")
@click.option("--figure", type=FilePath, help="Also draw the losses here (.png, .svg or .pdf).")
@preprocessing_options
@json_option
def sensitivity(
    model: str,
    images: Path,
    identities: str | None,
    num_images: int,
    run_dir: Path | None,
    figure: Path | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure what quantizing each layer alone costs, its weight and what it reads, at 2 to 8 bits."""
    if figure is not None:
        check_figure(figure)
    network = resolve_model(model, preprocessing=preprocessing)
    result = qface.sensitivity(network, images, identities, num_images=num_images, run_dir=run_dir)
    if figure is not None:
        sensitivity_figure(result, figure)
    show(result.to_dict(), sensitivity_tables(result), as_json)
