"""Options that several commands share, and the settings that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

import qface
from qface.choices import ImportanceName, PrecisionName

__all__ = [
    "PRUNING_FIELDS",
    "FilePath",
    "distill_config",
    "images_option",
    "json_option",
    "people_option",
    "preprocessing_options",
    "pruning_options",
    "training_options",
    "weights_option",
]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
FilePath = click.Path(path_type=Path)


def _options(*options: Callable[[FunctionT], FunctionT]) -> Callable[[FunctionT], FunctionT]:
    """Several options as one decorator."""

    def decorate(function: FunctionT) -> FunctionT:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


images_option = click.option(
    "--images",
    required=True,
    type=FilePath,
    help="Folder of 112x112 face crops, one folder a person, or all in one where it is not known who is who.",
)
people_option = click.option(
    "--people",
    "identities",
    help="Which people: first-half, second-half, or a file with one name a line.  [default: all]",
)
weights_option = click.option(
    "--weights",
    type=FilePath,
    help="A file of weights for the network MODEL, a name or package.module:factory.  [default: its own]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of words.")


class _Numbers(click.ParamType[Any]):
    """So many numbers with commas between them; one of them may stand for all.

    Args:
        name: for messages and help.
        kind: of the numbers.
        count: how many there are.
        separator: between them.
        repeats: True if a single number stands for all.
    """

    def __init__(self, name: str, kind: type[int] | type[float], count: int, separator: str, repeats: bool) -> None:
        self.name = name
        self._kind, self._count, self._separator, self._repeats = kind, count, separator, repeats

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers of ``value``."""
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
    click.option("--color", type=click.Choice(["RGB", "BGR"]), help="Color order the model reads.  [default: found]"),
    click.option(
        "--mean",
        type=_Numbers("NUMBER or R,G,B", float, 3, ",", repeats=True),
        help="Mean in 0..255 that is subtracted from the pixels before they reach the model.  [default: found]",
    ),
    click.option(
        "--std",
        type=_Numbers("NUMBER or R,G,B", float, 3, ",", repeats=True),
        help="What the pixels are divided by after that: 1 for a model that reads bytes.  [default: found]",
    ),
    click.option(
        "--crop",
        type=_Numbers("TOP,LEFT,BOTTOM,RIGHT", int, 4, ",", repeats=False),
        help="Part of the 112x112 crop that the model reads, in pixels.  [default: found]",
    ),
    click.option(
        "--size",
        type=_Numbers("HEIGHTxWIDTH", int, 2, "x", repeats=True),
        help="Size that the model reads, in pixels; 112x96 is columns 8 to 104.  [default: found]",
    ),
)


def preprocessing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for what a model reads, in place of what its file says; given as the mapping ``preprocessing``.

    Of two models they are for the first one, the teacher.
    """

    @functools.wraps(function)
    def collected(color: str | None, mean: Any, std: Any, crop: Any, size: Any, **others: Any) -> Any:
        fields = {"color": color, "mean": mean, "std": std, "crop": crop, "size": size}
        given = {name: value for name, value in fields.items() if value is not None}
        return function(preprocessing=given, **others)

    return _PREPROCESSING(collected)


training_options = _options(
    click.option("--epochs", type=int, default=1, help="Epochs to train: rounds of as many images as there are."),
    click.option("--batch-size", type=int, help="Images a step.  [default: the recipe's]"),
    click.option("--lr", "learning_rate", type=float, help="Learning rate.  [default: the recipe's]"),
    click.option(
        "--recipe",
        type=click.Choice(["qface", "paper"]),
        default="qface",
        help="Loss and optimizer: ours or the paper's; ranges and calibration are ours either way.",
    ),
    click.option(
        "--precision",
        type=click.Choice(get_args(PrecisionName)),
        default="float32",
        help="What is multiplied in: bf16 is faster for large networks, on GPUs and on CPUs with AMX.",
    ),
    click.option(
        "--augment", is_flag=True, help="Also show faces turned, ill aligned, small, blurred, dark and covered."
    ),
    click.option("--seed", type=int, default=0, help="Seed of batches, flips and changes of faces."),
    click.option("--device", help="Where to train.  [default: cuda where there is one, else cpu]"),
    click.option(
        "--run-dir",
        type=FilePath,
        help="Folder for checkpoints and the log.  [default: OUTPUT.run, until the output is written]",
    ),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in the run folder."),
    click.option("--checkpoint-every", type=int, help="Steps between two checkpoints.  [default: the recipe's]"),
)

pruning_options = _options(
    click.option(
        "--importance",
        type=click.Choice(get_args(ImportanceName)),
        default="magnitude",
        help="How channel importance is measured.",
    ),
    click.option("--norm", type=int, default=2, help="Norm that magnitude takes of a channel's weights: 1 or 2."),
    click.option(
        "--global-pruning/--layer-pruning",
        default=False,
        help="Remove the weakest channels of the network, or the same share of each layer.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        help="Numbers of channels are multiples of it; 16 suits integer kernels best.",
    ),
    click.option("--ignored-layers", multiple=True, help="A layer whose outputs stay as they are; repeatable."),
    click.option(
        "--keep-embedding/--cut-embedding", default=True, help="Leave the embedding as long as it is, or prune it too."
    ),
    click.option("--repair/--no-repair", default=True, help="Solve for lost outputs on --images."),
    click.option("--reestimate/--no-reestimate", default=False, help="Measure batch norms again."),
    click.option("--iterative-steps", type=int, default=1, help="Rounds to remove the channels in."),
)
PRUNING_FIELDS = (
    "importance",
    "norm",
    "global_pruning",
    "round_to",
    "ignored_layers",
    "keep_embedding",
    "repair",
    "reestimate",
    "iterative_steps",
)


def distill_config(
    recipe: str, augment: bool = False, learning_rate: float | None = None, **settings: Any
) -> qface.DistillConfig:
    """The recipe's settings, and in their place those that were given."""
    base = qface.DistillConfig.paper() if recipe == "paper" else qface.DistillConfig()
    if augment:
        base = replace(base, augmentation=qface.AugmentationConfig())
    if learning_rate is not None:
        base = replace(base, optimizer=replace(base.optimizer, learning_rate=learning_rate))
    return replace(base, **{name: value for name, value in settings.items() if value is not None})
