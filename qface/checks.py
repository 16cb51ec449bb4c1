"""Settings and weights that users give, held against what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qface.errors import CheckpointError, ConfigError

__all__ = ["check_finite", "check_module", "check_seed", "check_whole"]

_SEEDS = 2**63


def check_whole(least: int, **settings: object) -> None:
    """Make sure that every setting is a whole number, ``least`` or greater.

    Raises:
        ConfigError: one is not; it is named.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is a whole number from {least} on, not {value!r}")


def check_seed(seed: object) -> None:
    """Make sure that ``seed`` is one that torch and numpy take.

    Raises:
        ConfigError: it is not.
    """
    check_whole(0, seed=seed)
    if isinstance(seed, int) and seed >= _SEEDS:
        raise ConfigError(f"seed is a whole number below 2^63, not {seed}")


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: a tensor holds NaN or an infinity; the message counts the tensors and names the first.
    """
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity (first: {broken[0]}); "
            "the training that wrote it diverged, use an earlier checkpoint"
        )


def check_module(model: object) -> None:
    """Make sure that ``model`` is a network, where no path can take its place.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; qface.load makes one of a file"
        )
