"""Options that several commands share, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

import qface
from qface.distillation.distill_config import PrecisionName
from qface.pruning.pruning_config import ImportanceName

__all__ = [
    "PRUNING_FIELDS",
    "FilePath",
    "distill_config",
    "images_option",
    "json_option",
    "people_option",
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
weights_option = click.option("--weights", type=FilePath, help="A file of weights for the network that --model makes.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
training_options = _options(
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
    click.option("--run-dir", type=FilePath, help="Folder for checkpoints and the log."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in --run-dir."),
)

pruning_options = _options(
    click.option(
        "--importance",
        type=click.Choice(get_args(ImportanceName)),
        default="magnitude",
        show_default=True,
        help="How channel importance is measured.",
    ),
    click.option("--norm", type=int, default=2, show_default=True, help="Of magnitude: 1 or 2."),
    click.option(
        "--global-pruning/--layer-pruning",
        default=False,
        show_default=True,
        help="Remove the weakest channels of the network, or the same share of each layer.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        show_default=True,
        help="Numbers of channels are multiples of it; 16 suits integer kernels best.",
    ),
    click.option("--ignored-layers", multiple=True, help="A layer whose outputs stay as they are; repeatable."),
    click.option("--keep-embedding/--cut-embedding", default=True, show_default=True),
    click.option("--repair/--no-repair", default=True, show_default=True, help="Solve for lost outputs on --images."),
    click.option("--reestimate/--no-reestimate", default=False, show_default=True, help="Measure batch norms again."),
    click.option("--iterative-steps", type=int, default=1, show_default=True, help="Rounds to remove the channels in."),
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


def distill_config(recipe: str, **settings: Any) -> qface.DistillConfig:
    """The recipe's settings, and in their place those that were given."""
    base = qface.DistillConfig.paper() if recipe == "paper" else qface.DistillConfig()
    return replace(base, **{name: value for name, value in settings.items() if value is not None})
