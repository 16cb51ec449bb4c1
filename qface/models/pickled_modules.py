"""Tensors out of files that hold a whole pickled module, without running anything that such a file asks for.

``torch.save(model)`` writes a zip archive: ``data.pkl`` names classes and functions of its author, and ``data/0``,
``data/1``, ... are the bytes of tensors. Here every class is a shell that keeps what it is given, and of all functions
only those that rebuild tensors are known; parameters and buffers are then read off the shells.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qface.errors import CheckpointError, one_line
from qface.pickles import check_pickle

__all__ = ["read_pickled_module"]

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DEEPEST = 64  # levels of modules in modules


def read_pickled_module(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of the module in ``path``, by their names in its ``state_dict``.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds no module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _Unpickler.of(archive).load()
    except Exception as error:  # damaged bytes may make zipfile, pickle and torch raise anything
        raise CheckpointError(f"{path} is no complete torch file ({one_line(error, 200)}); fetch it again") from error
    if not isinstance(root, _Shell):
        raise CheckpointError(
            f"{path} holds more than tensors and is no module either, and qface does not run code from files; "
            "save its state_dict() and load that"
        )
    return dict(_tensors(root, "", 0))


class _Shell:
    """Stands for an object of any class: keeps its state, and does nothing with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def _ignore(self, *args: Any) -> None:
        pass

    # What pickle calls to fill dictionaries, lists and sets of a class of its own.
    __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    """One that knows how tensors are rebuilt, and gives a shell for whatever else is named."""

    @classmethod
    def of(cls, archive: zipfile.ZipFile) -> _Unpickler:
        (pickled,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = io.BytesIO(archive.read(pickled))
        check_pickle(content)
        unpickler = cls(content, encoding="utf-8")
        unpickler._archive, unpickler._folder = archive, folder
        return unpickler

    _archive: zipfile.ZipFile
    _folder: str

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return _KNOWN.get((module, name), _Shell)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdecimal():
            raise pickle.UnpicklingError(f"it names {kind!r} where a storage is expected")
        content = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(values) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} numbers, not {count}")
        return values


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if math.prod(size) > len(storage):
        raise pickle.UnpicklingError(f"a tensor of {list(size)} repeats the {len(storage)} numbers that it holds")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def _tensors(shell: _Shell, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module that ``shell`` stands for, and of those within it."""
    if depth > _DEEPEST:
        raise CheckpointError("a pickled module holds itself; save model.state_dict() and load that")
    for kind in ("_parameters", "_buffers"):
        for name, value in _entries(shell, kind):
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.contiguous()
    for name, module in _entries(shell, "_modules"):
        if isinstance(module, _Shell):
            yield from _tensors(module, f"{prefix}{name}.", depth + 1)


def _entries(shell: _Shell, kind: str) -> list[tuple[str, Any]]:
    found = shell.state.get(kind)
    return [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []
