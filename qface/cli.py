"""The command line: each command parses its options, calls one verb of the library and prints what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import click
from rich.console import Console
from torch import nn

import qface
from qface.demo import run_demo
from qface.deployment.export import TARGETS
from qface.deployment.inputs import INPUTS
from qface.deployment.latency import compare, open_file
from qface.deployment.lowering import hindrance
from qface.distillation import check_run
from qface.distillation.config import PrecisionName
from qface.errors import ConfigError, QFaceError
from qface.evaluation import TemplateProtocol
from qface.files import check_folder
from qface.models.resolve import resolve_model
from qface.models.store import check_model_file, check_savable
from qface.pruning import cost_of
from qface.pruning.config import ImportanceName, ScopeName
from qface.reporting import (
    agreement_table,
    alignment_table,
    costs_table,
    demo_table,
    evaluation_table,
    latency_table,
    sensitivity_figure,
    sensitivity_tables,
    templates_table,
    thresholds_table,
)
from qface.reporting.figures import check_figure
from qface.reporting.tables import size_tables

__all__ = ["export_alias", "main"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_Path = click.Path(path_type=Path)


class _OneLineErrors(click.Command):
    """Turns errors of the library into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QFaceError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


class _Group(_OneLineErrors, click.Group):
    """The command ``qface``."""


def _options(*options: Callable[[FunctionT], FunctionT]) -> Callable[[FunctionT], FunctionT]:
    """Several options as one decorator."""

    def decorate(function: FunctionT) -> FunctionT:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_images = click.option(
    "--images",
    required=True,
    type=_Path,
    help="Folder of 112x112 face crops, one folder a person, or all in one where it is not known who is who.",
)
_people = click.option(
    "--people", help="Which people: first-half, second-half, or a file with one name a line.  [default: all]"
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
_training = _options(
    click.option("--epochs", type=int, default=1, show_default=True, help="Rounds of as many images as there are."),
    click.option("--batch-size", type=int, help="Images a step.  [default: the recipe's]"),
    click.option("--lr", "learning_rate", type=float, help="Learning rate.  [default: the recipe's]"),
    click.option(
        "--recipe",
        type=click.Choice(["qface", "paper"]),
        default="qface",
        show_default=True,
        help="Loss and optimizer: ours or the paper's; ranges and calibration are ours either way.",
    ),
    click.option(
        "--precision",
        type=click.Choice(get_args(PrecisionName)),
        default="float32",
        show_default=True,
        help="What is multiplied in: bf16 is faster for large networks, on GPUs and on CPUs with AMX.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of batches and flips."),
    click.option("--device", help="Where to train.  [default: cuda where there is one, else cpu]"),
    click.option("--run-dir", type=_Path, help="Folder for checkpoints and the log."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in --run-dir."),
)

_pruning = _options(
    click.option(
        "--importance",
        type=click.Choice(get_args(ImportanceName)),
        default="magnitude",
        show_default=True,
        help="What the weakest channels are told by.",
    ),
    click.option("--norm", type=int, default=2, show_default=True, help="Of magnitude: 1 or 2."),
    click.option(
        "--scope",
        type=click.Choice(get_args(ScopeName)),
        default="layer",
        show_default=True,
        help="Remove the same share of each layer, or the weakest of the network.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        show_default=True,
        help="Widths are multiples of it; 16 suits integer kernels best.",
    ),
    click.option("--keep", multiple=True, help="A layer whose outputs stay as they are; repeatable."),
    click.option("--keep-embedding/--cut-embedding", default=True, show_default=True),
    click.option("--repair/--no-repair", default=True, show_default=True, help="Solve for lost outputs on --images."),
    click.option("--reestimate/--no-reestimate", default=False, show_default=True, help="Measure batch norms again."),
    click.option("--steps", type=int, default=1, show_default=True, help="Rounds to remove the channels in."),
)
_PRUNING = ("importance", "norm", "scope", "round_to", "keep", "keep_embedding", "repair", "reestimate", "steps")


def _distill_config(recipe: str, **settings: Any) -> qface.DistillConfig:
    """The recipe's settings, and in their place those that were given."""
    base = qface.DistillConfig.paper() if recipe == "paper" else qface.DistillConfig()
    return replace(base, **{name: value for name, value in settings.items() if value is not None})


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qface.__version__, prog_name="qface")
def main() -> None:
    """Make face-recognition networks small and fast without losing what they know."""


@main.command()
@click.option("--model", required=True, help="Teacher: a file, a name such as iresnet18, or package.module:factory.")
@click.option("--weights", type=_Path, help="A file of weights for the network that --model makes.")
@_images
@_people
@click.option("--bits", type=int, default=6, show_default=True, help="Width of weights and activations, 2 to 8.")
@click.option("--weight-bits", type=int, help="Width of weights alone.")
@click.option("--activation-bits", type=int, help="Width of activations alone.")
@click.option("--budget-mb", type=float, help="Greatest size of the file: a width for each weight that fits it best.")
@click.option("--distill/--no-distill", default=True, show_default=True, help="Fine-tune after calibration.")
@click.option("-o", "--output", required=True, type=_Path, help="Student file to write (.safetensors).")
@_training
def quantize(
    model: str,
    weights: Path | None,
    images: Path,
    people: str | None,
    bits: int,
    weight_bits: int | None,
    activation_bits: int | None,
    budget_mb: float | None,
    distill: bool,
    output: Path,
    run_dir: Path | None,
    resume: bool,
    **training: Any,
) -> None:
    """Quantize a network, calibrate it on faces, and distil it."""
    check_model_file(output)
    settings = _distill_config(**training)
    config = qface.QuantizationConfig(
        bits if weight_bits is None else weight_bits, bits if activation_bits is None else activation_bits
    )
    if not distill:
        _refuse_run(run_dir, resume)
    if budget_mb is not None and weight_bits is not None:
        raise ConfigError("--budget-mb chooses the widths of weights by itself; leave out --weight-bits")
    teacher = resolve_model(model, weights)
    student = qface.quantize(teacher, config)
    check_savable(student)
    if distill:
        check_run(settings, run_dir, resume)
    if budget_mb is not None:
        config = qface.allocate_bits(teacher, images, budget_mb, people, config.activation_bits, progress=True)
        student = qface.quantize(teacher, config)
    _note_hindrance(student)
    qface.calibrate(student, images, people=people, progress=True)
    if distill:
        qface.distill(student, teacher, images, settings, run_dir, resume, people=people)
    qface.save(student, output)
    click.echo(f"wrote {output}")


def _refuse_run(run_dir: Path | None, resume: bool) -> None:
    """Of a command that is not to train."""
    if resume or run_dir is not None:
        raise ConfigError("--run-dir and --resume are of the fine-tuning: give --distill as well, or leave them out")


def _note_hindrance(student: nn.Module) -> None:
    """Say what will keep a student from being exported before it is trained for long."""
    found = hindrance(student)
    if found is not None:
        click.echo(
            f"Note: this student can be trained and evaluated, but qface export will refuse it: {found}", err=True
        )


@main.command()
@click.option("--model", required=True, help="Network: a file, a name such as iresnet18, or package.module:factory.")
@click.option("--weights", type=_Path, help="A file of weights for the network that --model makes.")
@click.option("--ratio", type=float, help="Share of channels to remove.  [default: 0.2]")
@click.option("--parameters", type=float, help="Instead: remove as little as leaves so many parameters.")
@click.option("--macs", type=float, help="Instead: remove as little as leaves so many products an image.")
@click.option("--mb", type=float, help="Instead: remove as little as leaves so many 10^6 bytes of float32.")
@click.option("--images", type=_Path, help="Folder of face crops, for repair, importance and --distill.")
@_people
@_pruning
@click.option("--distill/--no-distill", default=False, show_default=True, help="Fine-tune on --images after each step.")
@click.option("-o", "--output", required=True, type=_Path, help="Network file to write (.safetensors).")
@_json
@_training
def prune(
    model: str,
    weights: Path | None,
    ratio: float | None,
    parameters: float | None,
    macs: float | None,
    mb: float | None,
    images: Path | None,
    people: str | None,
    distill: bool,
    output: Path,
    as_json: bool,
    run_dir: Path | None,
    resume: bool,
    **options: Any,
) -> None:
    """Remove whole channels of a network."""
    check_model_file(output)
    if distill and images is None:
        raise ConfigError("--distill needs faces to train on: give --images")
    if not distill:
        _refuse_run(run_dir, resume)
    wanted = _share_or_budget(ratio, parameters=parameters, macs=macs, mb=mb)
    config = qface.PruningConfig(seed=options["seed"], **{name: options.pop(name) for name in _PRUNING})
    training = _distill_config(**options)
    teacher = resolve_model(model, weights)
    check_savable(teacher)
    folders = {step: None if run_dir is None else run_dir / f"step-{step}" for step in range(1, config.steps + 1)}
    if distill:
        for folder in folders.values():
            check_run(training, folder, resume)

    def tune(pruned: nn.Module, step: int) -> None:
        qface.distill(pruned, teacher, cast(Path, images), training, folders[step], resume, people=people)

    pruned = qface.prune(teacher, wanted, images, config, people, tune if distill else None, progress=True)
    if distill:
        tune(pruned, config.steps)
    qface.save(pruned, output)
    before, after = cost_of(teacher), cost_of(pruned)
    _print({"before": asdict(before), "after": asdict(after)}, costs_table(before, after), as_json)


def _share_or_budget(ratio: float | None, **budgets: float | None) -> float | qface.Budget:
    given = {unit: limit for unit, limit in budgets.items() if limit is not None}
    if len(given) + (ratio is not None) > 1:
        raise ConfigError("--ratio, --parameters, --macs and --mb each say how much to remove: give one of them")
    for unit, limit in given.items():
        return qface.Budget(limit, cast(Any, unit))
    return 0.2 if ratio is None else ratio


@main.command()
@click.option("--student", required=True, type=_Path, help="Student file.")
@click.option("--teacher", required=True, help="Teacher: a file, a name, or package.module:factory.")
@_images
@_people
@click.option("-o", "--output", required=True, type=_Path, help="Student file to write (.safetensors).")
@_training
def distill(
    student: Path,
    teacher: str,
    images: Path,
    people: str | None,
    output: Path,
    run_dir: Path | None,
    resume: bool,
    **training: Any,
) -> None:
    """Fine-tune a student to embed faces as its teacher does."""
    check_model_file(output)
    settings = _distill_config(**training)
    learner, known = qface.load(student), resolve_model(teacher)
    qface.distill(learner, known, images, settings, run_dir, resume, people=people)
    qface.save(learner, output)
    click.echo(f"wrote {output}")


@main.command()
@click.argument("model")
@_images
@_people
@click.option("--pairs", type=_Path, help="Pair list in LFW's format, for ten-fold accuracy.")
@click.option("--gallery", help="Another model that embeds the gallery, while MODEL embeds the probes.")
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@_json
def evaluate(
    model: str, images: Path, people: str | None, pairs: Path | None, gallery: str | None, flip: bool, as_json: bool
) -> None:
    """Measure verification on faces; MODEL is a student, a float network or an .onnx file."""
    result = qface.evaluate(
        _embedder(model),
        images,
        pairs=pairs,
        people=people,
        gallery=_embedder(gallery) if gallery else None,
        flip=flip,
        progress=True,
    )
    _print(result.to_dict(), evaluation_table(result), as_json)


@main.command()
@click.argument("model")
@click.option("--data", required=True, type=_Path, help="Folder of IJB-B or IJB-C, with meta/ and loose_crop/.")
@click.option(
    "--protocol",
    type=click.Choice(get_args(TemplateProtocol)),
    default="paper",
    show_default=True,
    help="A template is the mean of its images, or of its photos and videos.",
)
@click.option("--flip", is_flag=True, help="Add the embedding of the mirrored image.")
@click.option("--detector-score", is_flag=True, help="Weight images by the detector's score.")
@click.option("--run-dir", type=_Path, help="Folder to keep embeddings in; a run that was stopped goes on there.")
@_json
def ijb(
    model: str,
    data: Path,
    protocol: TemplateProtocol,
    flip: bool,
    detector_score: bool,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure 1:1 verification of templates on IJB-B or IJB-C; MODEL as for evaluate."""
    result = qface.evaluate_templates(_embedder(model), data, protocol, flip, detector_score, run_dir, progress=True)
    _print(result.to_dict(), templates_table(result), as_json)


@main.command()
@click.argument("photos", type=_Path)
@click.option("-o", "--output", required=True, type=_Path, help="Folder of crops to write.")
@click.option("--landmarks", type=_Path, help="Lines 'file x1 y1 ... x5 y5'.  [default: look for faces]")
@_json
def align(photos: Path, output: Path, landmarks: Path | None, as_json: bool) -> None:
    """Cut aligned 112x112 crops from PHOTOS, a folder; what is there already is kept."""
    report = qface.align(photos, output, landmarks, progress=True)
    _print(report.to_dict(), alignment_table(report), as_json)


@main.command()
@click.argument("teacher")
@click.argument("student")
@_images
@click.option("--people", help="Whom to set thresholds on, as for other commands.  [default: all]")
@click.option("--judged-on", help="Whom to measure them on.  [default: the same]")
@click.option("--fpr", default="1e-4", show_default=True, help="Share of impostors that may be accepted.")
@_json
def thresholds(
    teacher: str, student: str, images: Path, people: str | None, judged_on: str | None, fpr: str, as_json: bool
) -> None:
    """Set the cosine to accept where float meets float, quantized quantized, and quantized a float gallery."""
    models = (_embedder(teacher), _embedder(student))
    result = qface.operating_thresholds(*models, images, fpr, people, judged_on, progress=True)
    _print(result.to_dict(), thresholds_table(result), as_json)


def _embedder(text: str) -> nn.Module | Path:
    """A file for onnxruntime, or a network for torch."""
    return Path(text) if text.endswith(".onnx") else resolve_model(text)


@main.command()
@click.argument("model")
@_images
@_people
@click.option("--figure", type=_Path, help="Also draw the losses here (.png, .svg or .pdf).")
@_json
def sensitivity(model: str, images: Path, people: str | None, figure: Path | None, as_json: bool) -> None:
    """Measure what quantizing each layer alone costs, its weight and what it reads, at 2 to 8 bits."""
    if figure is not None:
        check_figure(figure)
    result = qface.sensitivity(resolve_model(model), images, people, progress=True)
    if figure is not None:
        sensitivity_figure(result, figure)
    _print(result.to_dict(), sensitivity_tables(result), as_json)


@main.command(cls=_OneLineErrors)
@click.argument("student", type=_Path)
@click.option("-o", "--output", required=True, type=_Path, help="File to write (.onnx).")
@click.option(
    "--container",
    type=click.Choice(["packed", "int8"]),
    default="packed",
    show_default=True,
    help="How a student's weights lie in the file: to their bits, or a byte each.",
)
@click.option("--images", type=_Path, help="Faces to check the file on.  [default: synthetic ones]")
@click.option(
    "--input",
    "input_type",
    type=click.Choice(INPUTS),
    default="float32",
    show_default=True,
    help="What the file reads: normalised floats, or the bytes of RGB images.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="Where a student's file runs: with integers on CPUs, or in fp16 on GPUs.",
)
def export(student: Path, output: Path, container: str, images: Path | None, input_type: str, target: str) -> None:
    """Write a student as an integer ONNX file (a float network as a float one), and check what it computes."""
    check_folder(output)
    qface.export(qface.load(student), output, container, images, input_type, target)
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")


export_alias = export


@main.command()
@click.argument("student", type=_Path)
@click.argument("file", type=_Path)
@_images
@_people
@_json
def verify(student: Path, file: Path, images: Path, people: str | None, as_json: bool) -> None:
    """Prove that FILE computes what STUDENT computes, layer by layer and from end to end."""
    agreement = qface.verify(qface.load(student), file, images, people)
    _print(agreement.to_dict(), agreement_table(agreement), as_json)
    if not agreement.agrees:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("files", type=_Path, nargs=-1, required=True, metavar="FILE...")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads within an operation.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images a call.")
@click.option("--runs", type=int, default=40, show_default=True, help="Timed calls of each file.")
@_json
def bench(files: tuple[Path, ...], threads: int, batch: int, runs: int, as_json: bool) -> None:
    """Time ONNX files in turns; the first is what the others are measured by."""
    rows = compare([open_file(file, threads) for file in files], threads, batch, runs)
    _print({"rows": [row.to_dict() for row in rows]}, latency_table(rows, f"{runs} calls of each, in turns"), as_json)


@main.command()
@click.argument("model")
@click.option("--bits", type=int, default=6, show_default=True, help="Widths that a float network would get, 2 to 8.")
@_json
def size(model: str, bits: int, as_json: bool) -> None:
    """Say what each byte is spent on; MODEL is an .onnx file, or a network whose packed file is predicted."""
    ledger = qface.measure_size(_embedder(model), bits)
    _print(ledger.to_dict(), size_tables(ledger), as_json)


@main.command()
@click.option("-o", "--output", type=_Path, default=Path("runs/demo"), show_default=True, help="Folder for its files.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of training.")
@_json
def demo(output: Path, seed: int, as_json: bool) -> None:
    """Do the whole job on 400 real faces: train a small teacher, quantize, distil, export, evaluate."""
    report = run_demo(output, seed)
    _print(report.to_dict(), demo_table(report), as_json)


def _print(record: dict[str, Any], table: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record))
    else:
        Console().print(table)
