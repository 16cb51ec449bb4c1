"""Provenance of a model: the steps that made it, carried along and written into every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from qface._version import __version__
from qface.errors import CheckpointError, one_line
from qface.limits import named, parse_json
from qface.preprocessing import attach, preprocessing_of, with_preprocessing

__all__ = ["carry", "has_step", "provenance_of", "record_step", "with_provenance", "written_provenance"]

_ATTRIBUTE = "provenance"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def provenance_of(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """The steps that made ``model``, oldest first: each with ``step``, ``qface`` (version) and its settings."""
    return tuple(getattr(model, _ATTRIBUTE, ()))


def has_step(model: nn.Module, step: str) -> bool:
    """True if ``step`` is among those that made ``model``."""
    return any(made["step"] == step for made in provenance_of(model))


def with_provenance(model: ModuleT, steps: tuple[dict[str, Any], ...]) -> ModuleT:
    """Attach ``steps`` in place and return the model."""
    return attach(model, _ATTRIBUTE, steps)


def record_step(model: ModuleT, step: str, settings: Mapping[str, Any]) -> ModuleT:
    """Append one step to the provenance of ``model``, in place; ``settings`` must fit into JSON."""
    plain = json.loads(json.dumps(dict(settings), default=str))
    return with_provenance(model, (*provenance_of(model), {"step": step, "qface": __version__, **plain}))


def written_provenance(text: str, path: str | Path) -> tuple[dict[str, Any], ...]:
    """The steps that the metadata of the file at ``path`` hold as JSON.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        with named(path):
            steps = parse_json(text, "its provenance")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its provenance cannot be read ({one_line(error, 200)}); save it again"
        ) from error
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "step" in step for step in steps):
        raise CheckpointError(f"{path}: its provenance is no list of steps; save it again")
    return tuple(steps)


def carry(source: nn.Module, target: ModuleT) -> ModuleT:
    """Give ``target`` the preprocessing and provenance of ``source``, since torch.fx drops both."""
    return with_provenance(with_preprocessing(target, preprocessing_of(source)), provenance_of(source))
