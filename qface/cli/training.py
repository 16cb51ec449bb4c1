"""Commands that make and train networks: quantize, prune, distill."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

import qface
from qface.choices import CALIBRATION_IMAGES
from qface.cli.command import Command, note, show, written
from qface.cli.options import (
    PRUNING_FIELDS,
    FilePath,
    distill_config,
    images_option,
    json_option,
    people_option,
    preprocessing_options,
    pruning_options,
    training_options,
    weights_option,
)
from qface.cli.resumable import run_of
from qface.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["distill", "prune", "quantize"]


@click.command(
    cls=Command,
    examples=(
        "qface quantize teacher.onnx --images faces/ --people first-half -o student.safetensors",
        "qface quantize iresnet18 --weights r18.pth --images faces/ --budget-mb 8 --no-distill -o student.safetensors",
    ),
)
@click.argument("model")
@weights_option
@images_option
@people_option
@click.option("--bits", type=int, default=6, help="Bits of weights and activations, 2 to 8.")
@click.option("--weight-bits", type=int, help="Bits of weights alone, 2 to 8.  [default: --bits]")
@click.option("--activation-bits", type=int, help="Bits of activations alone, 2 to 8.  [default: --bits]")
@click.option(
    "--budget-mb",
    type=float,
    help="Maximum size of the exported file in MB (10^6 bytes); bits are chosen per weight.  [default: no limit]",
)
@click.option(
    "--ignored-layers", multiple=True, help="A layer that stays in float, or a pattern such as 'layer4.*'; repeatable."
)
@click.option("--num-images", type=int, default=CALIBRATION_IMAGES, help="Images to calibrate on, evenly spread.")
@click.option("--distill/--no-distill", default=True, help="Fine-tune after calibration.")
@click.option("-o", "--output", required=True, type=FilePath, help="Student file to write (.safetensors).")
@json_option
@preprocessing_options
@training_options
def quantize(
    model: str,
    weights: Path | None,
    images: Path,
    identities: str | None,
    bits: int,
    weight_bits: int | None,
    activation_bits: int | None,
    budget_mb: float | None,
    ignored_layers: tuple[str, ...],
    num_images: int,
    distill: bool,
    output: Path,
    as_json: bool,
    run_dir: Path | None,
    resume: bool,
    preprocessing: dict[str, Any],
    **training: Any,
) -> None:
    """Quantize a network, calibrate it on faces, and distill it.

    MODEL is a file, package.module:factory, or with --weights a name such as iresnet18.
    """
    from qface.distillation import check_run
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file, check_savable

    check_model_file(output)
    settings = distill_config(**training)
    config = qface.QuantizationConfig(
        bits if weight_bits is None else weight_bits,
        bits if activation_bits is None else activation_bits,
        ignored_layers=ignored_layers,
    )
    if not distill:
        _refuse_run(run_dir, resume)
    if budget_mb is not None and weight_bits is not None:
        raise ConfigError("--budget-mb chooses the bits of weights by itself; leave out --weight-bits")
    teacher = resolve_model(model, weights, preprocessing)
    student = qface.quantize(teacher, config)
    check_savable(student)
    with run_of(output, run_dir, resume) as run:
        if distill:
            check_run(settings, run.folder, run.resume)
        if budget_mb is not None:
            if ignored_layers:
                raise ConfigError("--budget-mb chooses the bits of all layers; leave out --ignored-layers")
            config = qface.allocate_bits(teacher, images, budget_mb, identities, config.activation_bits)
            student = qface.quantize(teacher, config)
        qface.calibrate(student, images, qface.CalibrationConfig(num_images), identities)
        plan = qface.inspect(student)
        note(plan.summary)
        if distill:
            with run.resumable():
                qface.distill(student, teacher, images, settings, run.folder, run.resume, identities=identities)
        qface.save(student, output)
    show({**written(output), "integer_share": plan.integer_share}, f"wrote {output}", as_json)


def _refuse_run(run_dir: Path | None, resume: bool) -> None:
    """Refuse the options of a run where a command is not to train."""
    if resume or run_dir is not None:
        raise ConfigError("--run-dir and --resume are of the fine-tuning: give --distill as well, or leave them out")


@click.command(
    cls=Command,
    examples=(
        "qface prune teacher.safetensors --ratio 0.3 -o pruned.safetensors",
        "qface prune teacher.safetensors --macs 2e8 --images faces/ --distill -o pruned.safetensors",
    ),
)
@click.argument("model")
@weights_option
@click.option("--ratio", type=float, help="Share of channels to remove, 0..1.  [default: 0.2]")
@click.option("--parameters", type=float, help="Instead: parameters to leave at most.  [default: --ratio]")
@click.option("--macs", type=float, help="Instead: multiply-adds of one image to leave at most.  [default: --ratio]")
@click.option("--mb", type=float, help="Instead: MB (10^6 bytes) of float32 to leave at most.  [default: --ratio]")
@click.option("--images", type=FilePath, help="Face crops for repair, importance and --distill.  [default: none]")
@people_option
@pruning_options
@click.option("--distill/--no-distill", default=False, help="Fine-tune on --images after each step.")
@click.option("-o", "--output", required=True, type=FilePath, help="Network file to write (.safetensors).")
@json_option
@preprocessing_options
@training_options
def prune(
    model: str,
    weights: Path | None,
    ratio: float | None,
    parameters: float | None,
    macs: float | None,
    mb: float | None,
    images: Path | None,
    identities: str | None,
    distill: bool,
    output: Path,
    as_json: bool,
    run_dir: Path | None,
    resume: bool,
    preprocessing: dict[str, Any],
    **options: Any,
) -> None:
    """Remove whole channels of a network; MODEL as for quantize."""
    from qface.distillation import check_run
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file, check_savable
    from qface.pruning import cost_of
    from qface.reporting import costs_table

    check_model_file(output)
    if distill and images is None:
        raise ConfigError("--distill needs faces to train on: give --images")
    if not distill:
        _refuse_run(run_dir, resume)
    wanted = _share_or_budget(ratio, parameters=parameters, macs=macs, mb=mb)
    config = qface.PruningConfig(seed=options["seed"], **{name: options.pop(name) for name in PRUNING_FIELDS})
    training = distill_config(**options)
    teacher = resolve_model(model, weights, preprocessing)
    check_savable(teacher)
    with run_of(output, run_dir, resume) as run:
        steps = {step: run.folder / f"step-{step}" for step in range(1, config.iterative_steps + 1)}
        if distill:
            for each in steps.values():
                check_run(training, each, run.resume)

        def tune(pruned: nn.Module, step: int) -> None:
            with run.resumable():
                qface.distill(
                    pruned, teacher, cast(Path, images), training, steps[step], run.resume, identities=identities
                )

        pruned = qface.prune(teacher, wanted, images, config, identities, tune if distill else None)
        if distill:
            tune(pruned, config.iterative_steps)
        qface.save(pruned, output)
    before, after = cost_of(teacher), cost_of(pruned)
    show({**written(output), "before": asdict(before), "after": asdict(after)}, costs_table(before, after), as_json)


def _share_or_budget(ratio: float | None, **budgets: float | None) -> float | qface.Budget:
    given = {unit: limit for unit, limit in budgets.items() if limit is not None}
    if len(given) + (ratio is not None) > 1:
        raise ConfigError("--ratio, --parameters, --macs and --mb each say how much to remove: give one of them")
    for unit, limit in given.items():
        return qface.Budget(limit, cast(Any, unit))
    return 0.2 if ratio is None else ratio


@click.command(
    cls=Command,
    examples=(
        "qface distill student.safetensors --teacher teacher.onnx --images faces/ -o better.safetensors",
        "qface distill student.safetensors --teacher t.onnx --images faces/ --run-dir run -o more.safetensors",
    ),
)
@click.argument("student")
@click.option("--teacher", required=True, help="Float network: a file or package.module:factory.")
@images_option
@people_option
@click.option("-o", "--output", required=True, type=FilePath, help="Student file to write (.safetensors).")
@json_option
@preprocessing_options
@training_options
def distill(
    student: str,
    teacher: str,
    images: Path,
    identities: str | None,
    output: Path,
    as_json: bool,
    run_dir: Path | None,
    resume: bool,
    preprocessing: dict[str, Any],
    **training: Any,
) -> None:
    """Fine-tune STUDENT, a file, to embed faces as its teacher does."""
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file

    check_model_file(output)
    settings = distill_config(**training)
    learner, known = resolve_model(student), resolve_model(teacher, preprocessing=preprocessing)
    with run_of(output, run_dir, resume) as run:
        with run.resumable():
            qface.distill(learner, known, images, settings, run.folder, run.resume, identities=identities)
        qface.save(learner, output)
    show(written(output), f"wrote {output}", as_json)
