"""Parameters and buffers of modules that were pickled whole, as by ``torch.save(model)``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from qface.errors import CheckpointError
from qface.pickles.torch_files import ObjectStandIn, read_torch_file

__all__ = ["is_pickled_module", "module_tensors", "read_pickled_module"]

_MAX_DEPTH = 64
_MAX_MODULES = 100_000
"""A module inside two others counts twice, so that shared modules in many levels cannot grow exponentially."""


def read_pickled_module(path: str | Path) -> dict[str, Tensor]:
    """Read parameters and buffers of a pickled module by their ``state_dict`` names.

    Args:
        path: a torch file that holds a module.

    Raises:
        CheckpointError: the file is no torch file, is damaged, or holds no module.
        LimitError: the file asks for more depth, objects or memory than :mod:`qface.limits` allows.
    """
    root = read_torch_file(path)
    if not is_pickled_module(root):
        raise CheckpointError(
            f"{path} holds more than tensors and is no module either, and qface does not run code from files; "
            "save its state_dict() and load that"
        )
    return module_tensors(root, path)


def is_pickled_module(value: Any) -> bool:
    """Return True if ``value`` is the stand-in for an ``nn.Module``."""
    return isinstance(value, ObjectStandIn) and isinstance(value.state.get("_modules"), dict)


def module_tensors(root: Any, path: str | Path) -> dict[str, Tensor]:
    """Return parameters and buffers of a pickled module by their ``state_dict`` names.

    Args:
        root: the stand-in for the module.
        path: the file, for error messages.

    Raises:
        CheckpointError: a tensor is of an unknown kind, or there are too many modules.
    """
    tensors: dict[str, Tensor] = {}
    for number, (prefix, module) in enumerate(_modules(root, "", 0)):
        if number == _MAX_MODULES:
            raise CheckpointError(
                f"{path} holds more than {_MAX_MODULES} modules; save model.state_dict() and load that"
            )
        tensors |= {f"{prefix}{name}": tensor for name, tensor in _tensors(module)}
    return tensors


def _modules(module: ObjectStandIn, prefix: str, depth: int) -> Iterator[tuple[str, ObjectStandIn]]:
    """Yield a module and its submodules, each with the prefix of its tensors' names."""
    if depth > _MAX_DEPTH:
        raise CheckpointError("a pickled module contains itself; save model.state_dict() and load that")
    yield prefix, module
    for name, child in _entries(module, "_modules"):
        if isinstance(child, ObjectStandIn):
            yield from _modules(child, f"{prefix}{name}.", depth + 1)


def _tensors(module: ObjectStandIn) -> Iterator[tuple[str, Tensor]]:
    """Yield the module's own parameters and persistent buffers."""
    names = module.state.get("_non_persistent_buffers_set")
    left_out = names if isinstance(names, set) else set()
    parameters, buffers = _entries(module, "_parameters"), _entries(module, "_buffers")
    for name, value in (*parameters, *((name, value) for name, value in buffers if name not in left_out)):
        if isinstance(value, Tensor):
            yield name, value.contiguous()
        elif value is not None:
            raise CheckpointError(
                f"{name} of a pickled module is a tensor of an unknown kind; save model.state_dict() and load that"
            )


def _entries(module: ObjectStandIn, kind: str) -> list[tuple[str, Any]]:
    found = module.state.get(kind)
    return [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []
