"""Commands that train or shrink networks: prune, distill."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

import qface
from qface.cli.command import Command, show, written
from qface.cli.options import (
    PRUNING_FIELDS,
    FilePath,
    distill_config,
    images_option,
    json_option,
    people_option,
    preprocessing_options,
    pruning_options,
    run_options,
    training_options,
    weights_option,
)
from qface.cli.resumable import run_of
from qface.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["distill", "prune"]


@click.command(
    cls=Command,
    examples=(
        "qface prune teacher.safetensors --ratio 0.3 -o pruned.safetensors",
        "qface prune teacher.safetensors --macs 2e8 --images faces/ --distill -o pruned.safetensors",
    ),
)
@click.argument("model")
@weights_option
@click.option("--ratio", type=float, help="Fraction of channels to remove, 0..1.  [default: 0.2]")
@click.option("--parameters", type=float, help="Instead: maximum number of parameters.  [default: --ratio]")
@click.option("--macs", type=float, help="Instead: maximum multiply-adds per image.  [default: --ratio]")
@click.option("--mb", type=float, help="Instead: maximum MB (10^6 bytes) of float32 weights.  [default: --ratio]")
@click.option("--images", type=FilePath, help="Face crops for repair, importance and --distill.  [default: none]")
@people_option
@pruning_options
@click.option("--distill/--no-distill", default=False, help="Fine-tune on --images after each step.")
@click.option("-o", "--output", required=True, type=FilePath, help="Network file to write (.safetensors).")
@json_option
@preprocessing_options
@training_options
@run_options
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
    """Remove channels of a float network; MODEL as for quantize."""
    from qface.distillation import check_run
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file, check_savable
    from qface.pruning import cost_of
    from qface.reporting.tables import costs_table

    check_model_file(output)
    if distill and images is None:
        raise ConfigError("--distill needs faces to train on: give --images")
    if not distill and (resume or run_dir is not None):
        raise ConfigError("--run-dir and --resume are for --distill: give --distill as well, or leave them out")
    wanted = _ratio_or_budget(ratio, parameters=parameters, macs=macs, mb=mb)
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


def _ratio_or_budget(ratio: float | None, **budgets: float | None) -> float | qface.Budget:
    given = {unit: limit for unit, limit in budgets.items() if limit is not None}
    if len(given) + (ratio is not None) > 1:
        raise ConfigError("give only one of --ratio, --parameters, --macs and --mb")
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
@run_options
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
    """Fine-tune STUDENT, a calibrated or pruned network, until its embeddings match those of its teacher."""
    from qface.models.resolve import resolve_model
    from qface.models.store import check_model_file
    from qface.quantization.calibrate import check_calibrated

    check_model_file(output)
    config = distill_config(**training)
    learner = resolve_model(student)
    check_calibrated(learner)
    known = resolve_model(teacher, preprocessing=preprocessing)
    with run_of(output, run_dir, resume) as run:
        with run.resumable():
            qface.distill(learner, known, images, config, run.folder, run.resume, identities=identities)
        qface.save(learner, output)
    show(written(output), f"wrote {output}", as_json)
