"""Finding a network's tensors in what a training script saved, and giving them the names that the network has."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qface.errors import CheckpointError
from qface.pickles import PickledArray, UnknownTensor, is_pickled_module, module_tensors

__all__ = ["network_tensors", "state_dict_of"]

_LOGGER = logging.getLogger("qface")

_WRAPPERS = (
    "state_dict",
    "state_dict_backbone",
    "net_state_dict",
    "model_state_dict",
    "backbone_state_dict",
    "model",
    "backbone",
    "net",
)
"""Entries of a checkpoint that hold the network, the first of them goes; Lightning's is ``state_dict``."""
_DEEPEST = 4  # wrappers in wrappers
_NOT_NETWORKS = ("optim", "sched", "scaler")
_COMPILED = "_orig_mod"  # what torch.compile calls the network within its own


def state_dict_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors of the network in an unpickled checkpoint, by their names there.

    Args:
        content: a ``state_dict``, or a dictionary that holds one or a pickled module beside other things. Arrays of
            numpy become tensors; what is neither is left out.
        path: the file, for messages.

    Raises:
        CheckpointError: it holds no tensors, or several sets of them whose names do not tell which is the network.
    """
    for _ in range(_DEEPEST):
        if is_pickled_module(content):
            return module_tensors(content, path)
        if not isinstance(content, Mapping):
            break
        wrapper = _wrapper_in(content, path)
        if wrapper is None:
            return _tensors_in(content, path)
        content = content[wrapper]
    raise CheckpointError(f"{path} does not hold a state_dict of tensors; save model.state_dict() and load that")


def _wrapper_in(content: Mapping[Any, Any], path: str | Path) -> Any:
    """The entry of ``content`` that holds the network; None where ``content`` is its state_dict itself."""
    known = next((name for name in _WRAPPERS if _is_wrapped(content.get(name))), None)
    if known is not None or any(_as_tensor(value) is not None for value in content.values()):
        return known
    holding = [name for name, value in content.items() if _holds_network(name, value)]
    if len(holding) > 1:
        raise CheckpointError(
            f"{path} holds {len(holding)} sets of tensors ({', '.join(map(repr, holding[:5]))}); "
            "save the state_dict of the network alone"
        )
    if holding:
        _LOGGER.info("%s: the network is taken from its entry %r", path, holding[0])
    return holding[0] if holding else None


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Mapping) or is_pickled_module(value)


def _holds_network(name: Any, value: Any) -> bool:
    if any(word in str(name).lower() for word in _NOT_NETWORKS):
        return False
    if isinstance(value, Mapping):
        wrapped = any(_is_wrapped(value.get(wrapper)) for wrapper in _WRAPPERS)
        return wrapped or any(_as_tensor(each) is not None for each in value.values())
    return is_pickled_module(value)


def _tensors_in(content: Mapping[Any, Any], path: str | Path) -> dict[str, Tensor]:
    found = {str(name): _as_tensor(value) for name, value in content.items()}
    others = [name for name, value in found.items() if value is None]
    tensors = {name: value for name, value in found.items() if value is not None}
    unknown = next((name for name, value in content.items() if isinstance(value, UnknownTensor)), None)
    if unknown is not None:
        raise CheckpointError(
            f"{path}: {unknown} is a sparse, nested, quantized or meta tensor; save a dense copy of it in float32"
        )
    if not tensors:
        raise CheckpointError(f"{path} does not hold a state_dict of tensors; save model.state_dict() and load that")
    if others:
        _LOGGER.info("%s: %d entries that are no tensors are left out (first: %r)", path, len(others), others[0])
    return tensors


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor of its own where ``value`` is one or an array of numbers."""
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, PickledArray):
        return None
    try:
        numbers = value.values()
        return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))
    except (TypeError, ValueError):  # of objects or bytes
        return None


def network_tensors(tensors: Mapping[str, Tensor], wanted: Collection[str], path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of one network, under the names that it gives them, out of a file that adds a prefix to each.

    Training adds prefixes: ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` or ``backbone.``
    (a module that holds the network beside its loss). What lies outside of the prefix is left out with a warning.

    Args:
        tensors: what the file holds.
        wanted: names that the network has.
        path: the file, for messages.

    Returns:
        ``tensors`` as they are where the names fit, or where no prefix makes them fit.

    Raises:
        CheckpointError: several prefixes make the names fit.
    """
    plain = tensors if any(_COMPILED in name for name in wanted) else _without_compiled(tensors, path)
    if not wanted or all(name in plain for name in wanted):
        return plain
    prefixes = _prefixes(plain, wanted)
    if len(prefixes) > 1:
        listed = ", ".join(repr(prefix) for prefix in prefixes)
        raise CheckpointError(f"{path} holds several such networks, under {listed}; save the state_dict of one of them")
    if prefixes:
        return _below(plain, prefixes[0], path)
    own = _common_prefix(list(wanted))  # the network itself is wrapped, and the file is not
    if own and all(name.removeprefix(own) in plain for name in wanted):
        _LOGGER.info("%s: %r is put before all names, as the network has them", path, own)
        return {own + name: tensor for name, tensor in plain.items()}
    return tensors


def _without_compiled(tensors: Mapping[str, Tensor], path: str | Path) -> Mapping[str, Tensor]:
    """``tensors`` without the component that torch.compile adds to names, wherever it stands."""
    names = {name: ".".join(part for part in name.split(".") if part != _COMPILED) for name in tensors}
    compiled = sum(name != plain for name, plain in names.items())
    if compiled:
        _LOGGER.info("%s: %d names are read without their prefix '%s.'", path, compiled, _COMPILED)
    return {plain: tensors[name] for name, plain in names.items()}


def _prefixes(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> list[str]:
    """The prefixes that can stand before all ``wanted`` names, so that each is there."""
    some = next(iter(wanted))
    candidates = [name.removesuffix(some) for name in tensors if name == some or name.endswith(f".{some}")]
    return [prefix for prefix in candidates if all(prefix + name in tensors for name in wanted)]


def _below(tensors: Mapping[str, Tensor], prefix: str, path: str | Path) -> dict[str, Tensor]:
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        _LOGGER.warning(
            "%s: the network is taken from %r, and %d other tensors are left out (first: %s)",
            path,
            prefix,
            len(others),
            others[0],
        )
    else:
        _LOGGER.info("%s: all names are read without their prefix %r", path, prefix)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _common_prefix(names: list[str]) -> str:
    """The components that all ``names`` begin with, the last of each apart."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)
    return "".join(f"{parts[0]}." for parts in shared)
