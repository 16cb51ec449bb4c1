"""Options that several commands share, and the settings they set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

import qface
from qface.choices import ColorOrder, ImportanceName, PrecisionName, RecipeName

__all__ = [
    "PRUNING_FIELDS",
    "FilePath",
    "distill_config",
    "images_option",
    "json_option",
    "people_option",
    "preprocessing_options",
    "pruning_options",
    "run_dir_option",
    "run_options",
    "training_options",
    "weights_option",
]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
FilePath = click.Path(path_type=Path)


def _options(*options: Callable[[FunctionT], FunctionT]) -> Callable[[FunctionT], FunctionT]:
    """Combine several options into one decorator."""

    def decorate(function: FunctionT) -> FunctionT:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


images_option = click.option(
    "--images",
    required=True,
    type=FilePath,
    help="Folder of 112x112 face crops, one subfolder per person, or a flat folder if identities are unknown.",
)
people_option = click.option(
    "--people",
    "identities",
    help="People to use: first-half, second-half, or a file with one name per line.  [default: all]",
)
weights_option = click.option(
    "--weights",
    type=FilePath,
    help="File of weights for MODEL, a name or package.module:factory.  [default: those of MODEL]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


class _Numbers(click.ParamType[Any]):
    """A fixed count of numbers, such as ``R,G,B``.

    Args:
        name: the format, for help and errors.
        kind: type of each number.
        count: how many numbers there are.
        separator: text between two numbers.
        repeats: True to accept a single number that is used for all.
    """

    def __init__(self, name: str, kind: type[int] | type[float], count: int, separator: str, repeats: bool) -> None:
        self.name = name
        self._kind, self._count, self._separator, self._repeats = kind, count, separator, repeats

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers in ``value``."""
        parts = str(value).split(self._separator)
        try:
            numbers = tuple(self._kind(part) for part in parts)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        if len(numbers) == 1 and self._repeats:
            return numbers * self._count
        if len(numbers) != self._count:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return numbers


_PREPROCESSING = _options(
    click.option(
        "--color", type=click.Choice(get_args(ColorOrder)), help="Color order of the model's input.  [default: found]"
    ),
    click.option(
        "--mean",
        type=_Numbers("NUMBER or R,G,B", float, 3, ",", repeats=True),
        help="Mean, 0..255, to subtract from the pixels.  [default: found]",
    ),
    click.option(
        "--std",
        type=_Numbers("NUMBER or R,G,B", float, 3, ",", repeats=True),
        help="Divisor of the pixels after that; 1 for a model whose input is bytes.  [default: found]",
    ),
    click.option(
        "--crop",
        type=_Numbers("TOP,LEFT,BOTTOM,RIGHT", int, 4, ",", repeats=False),
        help="Part of the 112x112 crop that the model uses, in pixels.  [default: found]",
    ),
    click.option(
        "--size",
        type=_Numbers("HEIGHTxWIDTH", int, 2, "x", repeats=True),
        help="Input size of the model in pixels; 112x96 means columns 8 to 104.  [default: found]",
    ),
)


def preprocessing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add options that override the preprocessing of a model, passed on as the mapping ``preprocessing``.

    A command with a student and a teacher applies them to the teacher; ``evaluate`` applies them to both its models.

    Args:
        function: the command's function.
    """

    @functools.wraps(function)
    def collected(color: str | None, mean: Any, std: Any, crop: Any, size: Any, **others: Any) -> Any:
        fields = {"color": color, "mean": mean, "std": std, "crop": crop, "size": size}
        given = {name: value for name, value in fields.items() if value is not None}
        return function(preprocessing=given, **others)

    return _PREPROCESSING(collected)


training_options = _options(
    click.option("--epochs", type=int, help="Epochs to train.  [default: 1, or 400 steps where that is more]"),
    click.option("--max-steps", type=int, help="Maximum number of training steps.  [default: no limit]"),
    click.option("--batch-size", type=int, help="Images per training step.  [default: the recipe's]"),
    click.option("--lr", "learning_rate", type=float, help="Learning rate.  [default: the recipe's]"),
    click.option(
        "--recipe",
        type=click.Choice(get_args(RecipeName)),
        default="qface",
        help="Loss and optimizer: those of qface or of the paper Ef-QuantFace. Calibration is the same for both.",
    ),
    click.option(
        "--precision",
        type=click.Choice(get_args(PrecisionName)),
        default="float32",
        help="Data type of products: bf16 is faster for large networks, on GPUs and on CPUs with AMX.",
    ),
    click.option("--augment", is_flag=True, help="Also rotate, shift, shrink, blur, darken and cover faces at random."),
    click.option("--seed", type=int, default=0, help="Seed of batches, flips and augmentation."),
    click.option("--device", help="Device to train on, as torch names it.  [default: cuda if present, else cpu]"),
    click.option("--checkpoint-every", type=int, help="Steps between two checkpoints.  [default: the recipe's]"),
)

run_dir_option = click.option(
    "--run-dir",
    type=FilePath,
    help="Folder in which the same command continues after a signal.  [default: OUTPUT.run, deleted when the output "
    "is written]",
)

run_options = _options(
    click.option(
        "--run-dir",
        type=FilePath,
        help="Folder of checkpoints and the log.  [default: OUTPUT.run, deleted when the output is written]",
    ),
    click.option("--resume", is_flag=True, help="Continue from the checkpoint in the run folder."),
)

pruning_options = _options(
    click.option(
        "--importance",
        type=click.Choice(get_args(ImportanceName)),
        default="magnitude",
        help="How channel importance is measured.",
    ),
    click.option("--norm", type=int, default=2, help="Norm of a channel's weights for magnitude: 1 or 2."),
    click.option(
        "--global-pruning/--layer-pruning",
        default=False,
        help="Remove the least important channels of the network, or the same fraction of each layer.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        help="Round numbers of channels down to a multiple of this; 16 suits integer kernels best.",
    ),
    click.option("--ignored-layers", multiple=True, help="Layer that keeps all its output channels; repeatable."),
    click.option(
        "--keep-embedding/--cut-embedding", default=True, help="Keep the embedding dimension, or prune it too."
    ),
    click.option(
        "--num-images", type=int, default=512, help="Images for repair, importance and BatchNorm, evenly spaced."
    ),
    click.option(
        "--repair/--no-repair", default=True, help="Refit the remaining weights by least squares on --images."
    ),
    click.option("--reestimate/--no-reestimate", default=False, help="Re-estimate BatchNorm statistics."),
    click.option("--iterative-steps", type=int, default=1, help="Number of steps to remove the channels in."),
)
PRUNING_FIELDS = (
    "importance",
    "norm",
    "global_pruning",
    "round_to",
    "ignored_layers",
    "keep_embedding",
    "num_images",
    "repair",
    "reestimate",
    "iterative_steps",
)


def distill_config(
    recipe: RecipeName, augment: bool = False, learning_rate: float | None = None, **settings: Any
) -> qface.DistillConfig:
    """Return the settings of a recipe, with the options that were given in place of its own.

    Args:
        recipe: ``"qface"`` or ``"paper"``.
        augment: True to augment images.
        learning_rate: learning rate of the optimizer; None keeps the recipe's.
        settings: fields of :class:`qface.DistillConfig`; None keeps the recipe's value.
    """
    base = qface.DistillConfig.paper() if recipe == "paper" else qface.DistillConfig()
    if augment:
        base = replace(base, augmentation=qface.AugmentationConfig())
    if learning_rate is not None:
        base = replace(base, optimizer=replace(base.optimizer, learning_rate=learning_rate))
    return replace(base, **{name: value for name, value in settings.items() if value is not None})
