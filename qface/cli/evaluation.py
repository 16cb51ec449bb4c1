"""Commands that measure accuracy: evaluate, identify, ijb, thresholds, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

import qface
from qface.choices import SENSITIVITY_IMAGES, TemplateProtocol
from qface.cli.command import Command, note, show
from qface.cli.options import FilePath, images_option, json_option, people_option, preprocessing_options
from qface.cli.resumable import continued_in
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
    help="Pair list: in LFW's format, for ten-fold accuracy, or lines path,path,flag.  [default: none]",
)
@click.option(
    "--gallery",
    help="Model of the gallery, with the input options of MODEL, which embeds the probes.  [default: MODEL]",
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to store embeddings in; a stopped run continues there.  [default: none]",
)
@click.option(
    "--bootstrap",
    type=int,
    default=0,
    help="Bootstrap replicates over people, for 95 % confidence intervals; 0 for none.",
)
@click.option(
    "--groups",
    type=FilePath,
    help="File of lines person,group: also measure each group and the gaps between them.  [default: none]",
)
@click.option(
    "--stress",
    is_flag=True,
    help="Measure misaligned, rotated, small, blurred, dark and covered faces against unchanged ones.",
)
@click.option(
    "--reference",
    help="With --groups or --stress: model to compare with, such as the float network.  [default: none]",
)
@click.option("--at-fpr", help="With --groups: FPR over all people, which sets the threshold.  [default: 1e-3]")
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
    """Measure 1:1 verification; MODEL is a student, a float network or an .onnx file.

    --color, --mean, --std, --crop and --size apply to MODEL, and to the model of --gallery or --reference.
    """
    from qface.evaluation import as_embedder

    given = {"pairs": pairs, "gallery": gallery, "flip": flip, "run_dir": run_dir, "bootstrap": bootstrap}
    given |= {"groups": groups, "stress": stress, "reference": reference, "at_fpr": at_fpr}
    _check_options("groups" if groups else "stress" if stress else None, given)
    chosen = as_embedder(model, preprocessing)
    given_second = gallery if reference is None else reference  # no kind of evaluation takes both
    second = None if given_second is None else as_embedder(given_second, preprocessing)
    if groups is not None:
        compared = qface.evaluate_groups(chosen, images, groups, second, at_fpr or "1e-3", identities, bootstrap, flip)
        show(compared.to_dict(), compared, as_json)
        return
    if stress:
        with continued_in(run_dir):
            changed = qface.evaluate_stress(
                chosen, images, pairs, identities, second, bootstrap=bootstrap, run_dir=run_dir
            )
        show(changed.to_dict(), changed, as_json)
        return
    with continued_in(run_dir):
        result = qface.evaluate(
            chosen,
            images,
            pairs=pairs,
            identities=identities,
            gallery=second,
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
"""Options of ``evaluate`` that each kind of evaluation uses, by the option that selects the kind."""


def _check_options(kind: str | None, options: Mapping[str, Any]) -> None:
    """Refuse options that the kind of evaluation would ignore."""
    for name in (name for name, value in options.items() if value and name not in _OPTIONS_OF[kind]):
        option = f"--{name.replace('_', '-')}"
        if kind is not None:
            raise ConfigError(f"{option} cannot be used with --{kind}: leave out one of them")
        kinds = " or ".join(f"--{each}" for each, names in _OPTIONS_OF.items() if each and name in names)
        raise ConfigError(f"{option} needs {kinds}: give that as well, or leave out {option}")


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
@click.option("--seed", type=int, default=0, help="Seed of the random choice of gallery images.")
@click.option(
    "--bootstrap",
    type=int,
    default=0,
    help="Bootstrap replicates over people, for 95 % confidence intervals; 0 for none.",
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
    """Measure 1:N identification with one gallery image per person; MODEL as for evaluate."""
    from qface.evaluation import as_embedder

    chosen = as_embedder(model, preprocessing)
    result = qface.evaluate_identification(chosen, images, identities, seed, bootstrap, flip)
    show(result.to_dict(), result, as_json)


@click.command(
    cls=Command,
    examples=(
        "qface ijb student.onnx --data IJBC/ --run-dir runs/ijbc --bootstrap 200",
        "qface ijb student.onnx --data IJBB/ --protocol arcface --flip --detector-score",
    ),
)
@click.argument("model")
@click.option("--data", required=True, type=FilePath, help="Folder of IJB-B or IJB-C, with meta/ and loose_crop/.")
@click.option(
    "--protocol",
    type=click.Choice(get_args(TemplateProtocol)),
    default="paper",
    help="A template is the mean of its images (paper), or of its photos and videos (arcface).",
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option("--detector-score", is_flag=True, help="Weight images by the detector's score.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to store embeddings in; a stopped run continues there.  [default: none]",
)
@click.option(
    "--bootstrap",
    type=int,
    default=0,
    help="Bootstrap replicates over people, for 95 % confidence intervals; 0 for none.",
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
    bootstrap: int,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure 1:1 verification and 1:N identification of templates on IJB-B or IJB-C; MODEL as for evaluate."""
    from qface.evaluation import as_embedder

    chosen = as_embedder(model, preprocessing)
    with continued_in(run_dir):
        result = qface.evaluate_templates(chosen, data, protocol, flip, detector_score, run_dir, bootstrap)
    show(result.to_dict(), result, as_json)


@click.command(
    cls=Command,
    examples=(
        "qface thresholds student.onnx --teacher teacher.onnx --images faces/ --fpr 1e-4",
        "qface thresholds student.onnx --teacher teacher.onnx --images faces/ --write student.onnx",
    ),
)
@click.argument("student")
@click.option(
    "--teacher", required=True, help="Float network: an .onnx file, a network file, or package.module:factory."
)
@images_option
@click.option(
    "--people", "identities", help="People to set thresholds on: first-half, second-half, or a file.  [default: all]"
)
@click.option("--eval-people", "eval_identities", help="People to measure thresholds on.  [default: those of --people]")
@click.option("--fpr", default="1e-4", help="FPR to set thresholds for, 0..1.")
@click.option(
    "--write",
    "file",
    type=FilePath,
    help="Also measure thresholds of this .onnx file at several FPRs, and write them into it.  [default: none]",
)
@preprocessing_options
@json_option
def thresholds(
    student: str,
    teacher: str,
    images: Path,
    identities: str | None,
    eval_identities: str | None,
    fpr: str,
    file: Path | None,
    preprocessing: dict[str, Any],
    as_json: bool,
) -> None:
    """Choose the cosine threshold of STUDENT: for a gallery of its own embeddings, and for one of its teacher's."""
    from qface.evaluation import as_embedder

    if file is not None:
        qface.thresholds_of(file)  # refuse an unreadable file before the work
    result = qface.operating_thresholds(
        student, as_embedder(teacher, preprocessing), images, fpr, identities, eval_identities
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
@click.option("--num-images", type=int, default=SENSITIVITY_IMAGES, help="Images to measure on, evenly spaced.")
@click.option(
    "--run-dir",
    type=FilePath,
    help="Folder to store losses in; a stopped run continues there.  [default: none]",
)
@click.option("--figure", type=FilePath, help="Figure of the losses to write (.png, .svg or .pdf).  [default: none]")
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
    """Measure the loss of quantizing one weight or activation tensor alone, at 2 to 8 bits."""
    from qface.models.resolve import resolve_model
    from qface.reporting.figures import check_figure, sensitivity_figure

    if figure is not None:
        check_figure(figure)
    network = resolve_model(model, preprocessing=preprocessing)
    with continued_in(run_dir):
        result = qface.sensitivity(network, images, identities, num_images=num_images, run_dir=run_dir)
    if figure is not None:
        sensitivity_figure(result, figure)
    show(result.to_dict(), result, as_json)
