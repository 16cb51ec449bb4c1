"""Commands that measure networks on faces: evaluate, identify, ijb, thresholds, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import TemplateProtocol
from qface.cli.command import Command, note, show
from qface.cli.options import FilePath, images_option, json_option, people_option, preprocessing_options
from qface.errors import ConfigError

__all__ = ["evaluate", "identify", "ijb", "sensitivity", "thresholds"]


@click.command(
    cls=Command,
    examples=(
        "qface evaluate student.onnx --images faces/ --people second-half --bootstrap 1000",
        "qface evaluate student.safetensors --images lfw/ --pairs pairs.txt --flip --json",
    ),
)
@click.argument("model")
@images_option
@people_option
@click.option(
    "--pairs",
    type=FilePath,
    help="Pair list, of LFW for ten-fold accuracy or lines path,path,flag.  [default: none]",
)
@click.option(
    "--gallery", help="Another model that embeds the gallery, while MODEL embeds the probes.  [default: MODEL]"
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to keep embeddings and counts of pairs in; a run that was stopped goes on there.  [default: none]",
)
@click.option("--bootstrap", type=int, default=0, help="Replicates for 95 % confidence intervals, over people.")
@click.option(
    "--groups",
    type=FilePath,
    help="File of lines person,group: measure each group, and the gaps between.  [default: none]",
)
@click.option(
    "--stress",
    is_flag=True,
    help="Measure changed faces against unchanged ones: ill aligned, turned, small, blurred, dark, covered.",
)
@click.option(
    "--reference", help="With --groups or --stress: another model, such as the float network.  [default: none]"
)
@click.option("--at-fpr", help="With --groups: FPR over everybody that sets the threshold.  [default: 1e-3]")
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
    groups: Path | None,
    stress: bool,
    reference: str | None,
    at_fpr: str | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure verification on faces; MODEL is a student, a float network or an .onnx file."""
    from qface.evaluation import as_embedder

    given = {"pairs": pairs, "gallery": gallery, "flip": flip, "run_dir": run_dir, "bootstrap": bootstrap}
    given |= {"groups": groups, "stress": stress, "reference": reference, "at_fpr": at_fpr}
    _check_options("groups" if groups else "stress" if stress else None, given)
    chosen = as_embedder(model, preprocessing)
    if groups is not None:
        compared = qface.evaluate_groups(
            chosen, images, groups, reference, at_fpr or "1e-3", identities, bootstrap, flip
        )
        show(compared.to_dict(), compared, as_json)
        return
    if stress:
        changed = qface.evaluate_stress(
            chosen, images, pairs, identities, reference, bootstrap=bootstrap, run_dir=run_dir
        )
        show(changed.to_dict(), changed, as_json)
        return
    result = qface.evaluate(
        chosen,
        images,
        pairs=pairs,
        identities=identities,
        gallery=gallery,
        flip=flip,
        run_dir=run_dir,
        bootstrap=bootstrap,
    )
    show(result.to_dict(), result, as_json)


_OPTIONS_OF = {
    None: {"pairs", "gallery", "flip", "run_dir", "bootstrap"},
    "groups": {"groups", "reference", "at_fpr", "flip", "bootstrap"},
    "stress": {"stress", "reference", "pairs", "run_dir", "bootstrap"},
}
"""Options of ``evaluate`` that go with one of its kinds of evaluation, by the option that asks for the kind."""


def _check_options(kind: str | None, options: Mapping[str, Any]) -> None:
    """Refuse what would be passed over."""
    for name in (name for name, value in options.items() if value and name not in _OPTIONS_OF[kind]):
        option = f"--{name.replace('_', '-')}"
        if kind is not None:
            raise ConfigError(f"{option} does not go with --{kind}: leave one of them out")
        kinds = " or ".join(f"--{each}" for each, names in _OPTIONS_OF.items() if each and name in names)
        raise ConfigError(f"{option} goes with {kinds}: give that as well, or leave {option} out")


@click.command(
    cls=Command,
    examples=(
        "qface identify student.onnx --images faces/",
        "qface identify student.onnx --images faces/ --people second-half --seed 1 --bootstrap 1000",
    ),
)
@click.argument("model")
@images_option
@people_option
@click.option("--seed", type=int, default=0, help="Seed of the draw of images that are enrolled.")
@click.option("--bootstrap", type=int, default=0, help="Replicates for 95 % confidence intervals, over people.")
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
    from qface.evaluation import as_embedder

    chosen = as_embedder(model, preprocessing)
    result = qface.evaluate_identification(chosen, images, identities, seed, bootstrap, flip)
    show(result.to_dict(), result, as_json)


@click.command(
    cls=Command,
    examples=(
        "qface ijb student.onnx --data IJBC/ --run-dir runs/ijbc",
        "qface ijb student.onnx --data IJBB/ --protocol arcface --flip --detector-score",
    ),
)
@click.argument("model")
@click.option("--data", required=True, type=FilePath, help="Folder of IJB-B or IJB-C, with meta/ and loose_crop/.")
@click.option(
    "--protocol",
    type=click.Choice(get_args(TemplateProtocol)),
    default="paper",
    help="A template is the mean of its images, or of its photos and videos.",
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option("--detector-score", is_flag=True, help="Weight images by the detector's score.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to keep embeddings in; a run that was stopped goes on there.  [default: none]",
)
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
    from qface.evaluation import as_embedder

    chosen = as_embedder(model, preprocessing)
    result = qface.evaluate_templates(chosen, data, protocol, flip, detector_score, run_dir)
    show(result.to_dict(), result, as_json)


@click.command(
    cls=Command,
    examples=(
        "qface thresholds teacher.onnx student.onnx --images faces/ --fpr 1e-4",
        "qface thresholds teacher.onnx student.onnx --images faces/ --people first-half --write student.onnx",
    ),
)
@click.argument("teacher")
@click.argument("student")
@images_option
@click.option("--people", "identities", help="Whom to set thresholds on, as for other commands.  [default: all]")
@click.option("--eval-people", "eval_identities", help="Whom to measure them on.  [default: the same]")
@click.option("--fpr", default="1e-4", help="Share of impostors that may be accepted, 0..1.")
@click.option(
    "--write",
    "file",
    type=FilePath,
    help="Also measure this .onnx file against itself at several FPRs, and write that into it.  [default: none]",
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
    from qface.evaluation import as_embedder

    if file is not None:
        qface.thresholds_of(file)  # a file that cannot be read is told before any work
    result = qface.operating_thresholds(
        as_embedder(teacher, preprocessing), student, images, fpr, identities, eval_identities
    )
    show(result.to_dict(), result, as_json)
    if file is not None:
        _write_thresholds(file, images, fpr, identities)


def _write_thresholds(file: Path, images: Path, fpr: str, identities: str | None) -> None:
    from qface.evaluation.match_thresholds import DEVICE_FPRS

    fprs = tuple(dict.fromkeys((fpr, *DEVICE_FPRS)))
    measured = qface.match_thresholds(file, images, fprs, identities)
    qface.write_thresholds(file, measured)
    note(f"wrote into {file}: {measured}")


@click.command(
    cls=Command,
    examples=(
        "qface sensitivity teacher.safetensors --images faces/ --people first-half",
        "qface sensitivity teacher.safetensors --images faces/ --figure losses.svg --json",
    ),
)
@click.argument("model")
@images_option
@people_option
@click.option("--num-images", type=int, default=64, help="Images to look at, evenly spread.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to keep losses in; a run that was stopped goes on there.  [default: none]",
)
@click.option("--figure", type=FilePath, help="Also draw the losses here (.png, .svg or .pdf).  [default: none]")
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
    from qface.models.resolve import resolve_model
    from qface.reporting import sensitivity_figure
    from qface.reporting.figures import check_figure

    if figure is not None:
        check_figure(figure)
    network = resolve_model(model, preprocessing=preprocessing)
    result = qface.sensitivity(network, images, identities, num_images=num_images, run_dir=run_dir)
    if figure is not None:
        sensitivity_figure(result, figure)
    show(result.to_dict(), result, as_json)
