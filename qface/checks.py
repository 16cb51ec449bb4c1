"""Checks of settings and weights that users pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeGuard, cast, get_args

from torch import Tensor, nn

from qface.errors import CheckpointError, ConfigError

__all__ = [
    "check_choice",
    "check_finite",
    "check_flag",
    "check_module",
    "check_not_negative",
    "check_positive",
    "check_seed",
    "check_share",
    "check_whole",
]

_SEEDS = 2**63


def check_whole(minimum: int, **settings: object) -> None:
    """Raise if a setting is not an integer >= ``minimum``.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}")


def check_positive(**settings: object) -> None:
    """Raise if a setting is not a finite number > 0.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """
    for name, value in settings.items():
        if not (_is_number(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number > 0, got {value!r}")


def check_not_negative(**settings: object) -> None:
    """Raise if a setting is not a finite number >= 0.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """
    for name, value in settings.items():
        if not (_is_number(value) and value >= 0):
            raise ConfigError(f"{name} must be a finite number >= 0, got {value!r}")


def check_share(**settings: object) -> None:
    """Raise if a setting is not a number from 0 to 1.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """
    for name, value in settings.items():
        if not (_is_number(value) and 0 <= value <= 1):
            raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def check_choice(choices: object, **settings: object) -> None:
    """Raise if a setting is not one of ``choices``.

    Args:
        choices: a ``Literal`` or a collection of values.
        settings: values by the name that the error shows.

    Raises:
        ConfigError: a setting has another value.
    """
    values = get_args(choices) or tuple(cast(Collection[object], choices))
    for name, value in settings.items():
        if value not in values:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")


def check_flag(**settings: object) -> None:
    """Raise if a setting is not a bool.

    Args:
        settings: values by the name that the error shows.

    Raises:
        ConfigError: a setting has another type.
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_seed(seed: object) -> None:
    """Raise if torch or numpy would reject ``seed``.

    Raises:
        ConfigError: the seed is not an integer in [0, 2^63).
    """
    check_whole(0, seed=seed)
    if isinstance(seed, int) and seed >= _SEEDS:
        raise ConfigError(f"seed must be an integer < 2^63, got {seed}")


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        CheckpointError: a tensor has NaN or infinity; the message counts these tensors and names the first.
    """
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} of {len(tensors)} tensors have NaN or infinity (first: {broken[0]}); "
            "the training diverged, use an earlier checkpoint"
        )


def check_module(model: object) -> None:
    """Raise if ``model`` is not a network; for functions that do not accept a path.

    Raises:
        ConfigError: ``model`` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}; load a file with qface.load")
