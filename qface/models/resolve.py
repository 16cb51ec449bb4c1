"""Resolve a user's model argument (module, file, factory or architecture name) to a network."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch import nn

from qface.errors import CheckpointError, ConfigError, one_line
from qface.models.store import MODEL_NAMES, load
from qface.preprocessing import PreprocessingOverride, overridden, preprocessing_of, with_preprocessing

__all__ = ["NetworkLike", "as_architecture", "as_network", "resolve_architecture", "resolve_model"]

NetworkLike = nn.Module | str | Path
"""A model argument: a module, the path of a model file, or ``package.module:factory``."""


def as_network(model: NetworkLike) -> nn.Module:
    """Return ``model`` if it is a module, else load it in eval mode on the CPU.

    Args:
        model: a module, the path of a model file, or ``package.module:factory``.

    Raises:
        CheckpointError: the file or factory does not exist or fails, or ``model`` is an architecture name, which has
            no weights.
        ConfigError: ``model`` has another type.
    """
    return model if isinstance(model, nn.Module) else resolve_model(_text(model))


def as_architecture(model: NetworkLike) -> nn.Module:
    """Return a network like :func:`as_network`, but allow architecture names, which get random weights.

    For functions that use only layers and shapes.

    Args:
        model: a module, the path of a model file, ``package.module:factory``, or one of
            :data:`qface.models.MODEL_NAMES`.

    Raises:
        CheckpointError: the file, name or factory does not exist or fails.
        ConfigError: ``model`` has another type.
    """
    return model if isinstance(model, nn.Module) else resolve_architecture(_text(model))


def _text(model: object) -> str:
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            "model must be a torch.nn.Module, the path of a file, or 'package.module:factory', "
            f"got {type(model).__name__}"
        )
    return str(model)


def resolve_model(
    text: str, weights: Path | None = None, preprocessing: PreprocessingOverride | None = None
) -> nn.Module:
    """Load the network that ``text`` names, with its weights, in eval mode.

    Args:
        text: the path of a model file; ``package.module:factory`` (a class or a function without arguments that
            returns a network; the package may be in the current folder); or, with ``weights``, one of
            :data:`qface.models.MODEL_NAMES`.
        weights: a file of weights for a factory's network or a named architecture.
        preprocessing: the model's input Preprocessing, or some of its fields; replaces the detected one.

    Raises:
        CheckpointError: the file or factory does not exist or fails, an architecture name comes without weights, or
            the weights do not fit.
        ConfigError: ``weights`` is given although ``text`` is a file.
    """
    if weights is None:
        _check_weights_known(text)
        return resolve_architecture(text, preprocessing)
    if _is_factory(text):
        return load(weights, model=_from_factory(text), preprocessing=preprocessing)
    if text in MODEL_NAMES:
        return load(weights, model=load(text), preprocessing=preprocessing)
    raise ConfigError(f"{text} already contains weights: omit {weights}, or give the architecture they belong to")


def resolve_architecture(text: str, preprocessing: PreprocessingOverride | None = None) -> nn.Module:
    """Load the network that ``text`` names, in eval mode; an architecture name gets random weights.

    For functions that use only layers and shapes.

    Args:
        text: the path of a model file, ``package.module:factory``, or one of :data:`qface.models.MODEL_NAMES`.
        preprocessing: the model's input Preprocessing, or some of its fields; replaces the detected one.

    Raises:
        CheckpointError: the file, name or factory does not exist or fails.
    """
    if _is_factory(text):
        network = _from_factory(text)
        return with_preprocessing(network, overridden(preprocessing_of(network), preprocessing))
    if text not in MODEL_NAMES and not os.path.exists(text):  # Path.exists raises on names that are too long
        raise CheckpointError(
            f"there is no file {text}; check the path, or give package.module:factory or one of "
            f"{', '.join(MODEL_NAMES)}"
        )
    return load(text, preprocessing=preprocessing)


def _check_weights_known(text: str) -> None:
    """Reject an architecture name, which would get random weights."""
    if text in MODEL_NAMES and not os.path.exists(text):
        raise CheckpointError(
            f"{text} is the name of an architecture and has no weights: give a model file, or add --weights FILE if "
            f"the command has this option (in Python: qface.load(FILE, model=qface.load({text!r})))"
        )


def _is_factory(text: str) -> bool:
    return bool(text.partition(":")[2]) and not os.path.exists(text)


def _from_factory(text: str) -> nn.Module:
    module_name, _, factory = text.partition(":")
    sys.path.insert(0, "")  # like python -m, to find modules in the current folder
    try:
        network = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:  # user code may raise anything
        raise CheckpointError(
            f"cannot create a model with {text}: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{text} must return a torch.nn.Module, got {type(network).__name__}")
    return network.eval()
