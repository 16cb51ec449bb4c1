"""From what a user passes or types to a network."""

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
"""Networks that users may pass: a module, or a file or ``package.module:factory``, which :func:`as_network` loads."""


def as_network(model: NetworkLike) -> nn.Module:
    """Return ``model`` itself, or the network with its weights that it means, in eval mode on the CPU.

    Raises:
        CheckpointError: there is no such file or factory, it cannot be read, or ``model`` is a name without weights.
        ConfigError: ``model`` is something else.
    """
    return model if isinstance(model, nn.Module) else resolve_model(_text(model))


def as_architecture(model: NetworkLike) -> nn.Module:
    """Like :func:`as_network`, for verbs that look at layers and sizes only: a bare name gets random weights.

    Raises:
        CheckpointError: there is no such file, name or factory, or it cannot be read.
        ConfigError: ``model`` is something else.
    """
    return model if isinstance(model, nn.Module) else resolve_architecture(_text(model))


def _text(model: object) -> str:
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"a model is a torch.nn.Module, the path of a file, or package.module:factory, not {type(model).__name__}"
        )
    return str(model)


def resolve_model(
    text: str, weights: Path | None = None, preprocessing: PreprocessingOverride | None = None
) -> nn.Module:
    """Return the network that ``text`` means, with its weights, in eval mode.

    Args:
        text: a file, ``package.module:factory``, a function without arguments (or a class) that returns a network,
            or, together with ``weights``, one of :data:`qface.models.MODEL_NAMES`. The current folder is searched for
            the package.
        weights: a file of weights for that network.
        preprocessing: what the network reads, or some fields of that, in place of what is found.

    Raises:
        CheckpointError: there is no such file or factory, a name has no weights, or the weights do not fit.
        ConfigError: weights are given beside a file.
    """
    if weights is None:
        _check_weights_known(text)
        return resolve_architecture(text, preprocessing)
    if _is_factory(text):
        return load(weights, model=_from_factory(text), preprocessing=preprocessing)
    if text in MODEL_NAMES:
        return load(weights, model=load(text), preprocessing=preprocessing)
    raise ConfigError(f"{text} brings its own weights: leave out {weights}, or name the network that reads them")


def resolve_architecture(text: str, preprocessing: PreprocessingOverride | None = None) -> nn.Module:
    """Return the network that ``text`` means, in eval mode; a bare name gets random weights.

    For verbs that look at layers and sizes only.

    Args:
        text: a file, ``package.module:factory``, or one of :data:`qface.models.MODEL_NAMES`.
        preprocessing: what the network reads, or some fields of that, in place of what is found.

    Raises:
        CheckpointError: there is no such file, name or factory.
    """
    if _is_factory(text):
        network = _from_factory(text)
        return with_preprocessing(network, overridden(preprocessing_of(network), preprocessing))
    if text not in MODEL_NAMES and not os.path.exists(text):  # unlike Path.exists, of names too long as well
        raise CheckpointError(
            f"there is no file {text}; check the path, or give package.module:factory or one of "
            f"{', '.join(MODEL_NAMES)}"
        )
    return load(text, preprocessing=preprocessing)


def _check_weights_known(text: str) -> None:
    """Refuse a name that would get random weights."""
    if text in MODEL_NAMES and not os.path.exists(text):
        raise CheckpointError(
            f"{text} is the name of an architecture, without weights: give a file instead, or, where a command has "
            f"the option, --weights FILE as well (in Python qface.load(FILE, model=qface.load({text!r})))"
        )


def _is_factory(text: str) -> bool:
    return bool(text.partition(":")[2]) and not os.path.exists(text)


def _from_factory(text: str) -> nn.Module:
    module_name, _, factory = text.partition(":")
    sys.path.insert(0, "")  # as python -m does, so that a user's own module is found
    try:
        network = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:  # it is the user's own code
        raise CheckpointError(
            f"cannot make a model of {text}: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{text} returned a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()
