"""From what a user types to a model."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch import nn

from qface.errors import CheckpointError, ConfigError, one_line
from qface.models.store import MODEL_NAMES, load
from qface.preprocessing import PreprocessingOverride, overridden, preprocessing_of, with_preprocessing

__all__ = ["resolve_model"]


def resolve_model(
    text: str, weights: Path | None = None, preprocessing: PreprocessingOverride | None = None
) -> nn.Module:
    """The network that ``text`` means, in eval mode.

    Args:
        text: a file, one of :data:`qface.models.MODEL_NAMES`, or ``package.module:factory``, a function without
            arguments (or a class) that returns a network. The current folder is searched for the package.
        weights: a file of weights for that network.
        preprocessing: what the network reads, or some fields of that, in place of what is found.

    Raises:
        CheckpointError: there is no such file, name or factory, or the weights do not fit.
        ConfigError: weights are given beside a file.
    """
    module_name, _, factory = text.partition(":")
    if factory and not os.path.exists(text):
        network = _from_factory(module_name, factory)
        if weights is not None:
            return load(weights, model=network, preprocessing=preprocessing)
        return with_preprocessing(network, overridden(preprocessing_of(network), preprocessing))
    if text in MODEL_NAMES and weights is not None:
        return load(weights, model=load(text), preprocessing=preprocessing)
    if weights is not None:
        raise ConfigError(f"{text} brings its own weights: leave out {weights}, or name the network that reads them")
    if text not in MODEL_NAMES and not os.path.exists(text):  # unlike Path.exists, of names too long as well
        raise CheckpointError(
            f"there is no model {text!r}; give a file, one of {', '.join(MODEL_NAMES)}, or package.module:factory"
        )
    return load(text, preprocessing=preprocessing)


def _from_factory(module_name: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")  # as python -m does, so that a user's own module is found
    try:
        network = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:  # it is the user's own code
        raise CheckpointError(
            f"cannot make a model of {module_name}:{factory}: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{module_name}:{factory} returned a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()
