"""Provenance of a model: the list of steps that produced it, stored in every file."""

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

__all__ = ["carry", "provenance_of", "record_step", "with_provenance", "written_provenance"]

_ATTRIBUTE = "provenance"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def provenance_of(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the steps of ``model``, oldest first: ``step``, ``qface`` (version) and the settings of each."""
    return tuple(getattr(model, _ATTRIBUTE, ()))


def with_provenance(model: ModuleT, steps: tuple[dict[str, Any], ...]) -> ModuleT:
    """Attach ``steps`` to ``model`` in place and return it."""
    return attach(model, _ATTRIBUTE, steps)


def record_step(model: ModuleT, step: str, settings: Mapping[str, Any]) -> ModuleT:
    """Append a step to the provenance of ``model`` in place and return the model.

    Settings that JSON cannot represent are stored as strings.
    """
    plain = json.loads(json.dumps(dict(settings), default=str))
    return with_provenance(model, (*provenance_of(model), {"step": step, "qface": __version__, **plain}))


def written_provenance(text: str, path: str | Path) -> tuple[dict[str, Any], ...]:
    """Parse ``text``, the provenance in the metadata of the file ``path``.

    Raises:
        CheckpointError: it cannot be parsed.
    """
    try:
        with named(path):
            steps = parse_json(text, "its provenance")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its provenance cannot be parsed ({one_line(error, 200)}); save the file again"
        ) from error
    if not isinstance(steps, list) or not all(isinstance(step, dict) and "step" in step for step in steps):
        raise CheckpointError(f"{path}: its provenance is not a list of steps; save the file again")
    return tuple(steps)


def carry(source: nn.Module, target: ModuleT) -> ModuleT:
    """Copy preprocessing and provenance from ``source`` to ``target``, since torch.fx drops them."""
    return with_provenance(with_preprocessing(target, preprocessing_of(source)), provenance_of(source))
