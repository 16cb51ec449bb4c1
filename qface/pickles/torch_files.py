"""Tensors out of torch files, without running anything that such a file asks for.

``torch.load`` is not used, even with ``weights_only=True``: it makes whatever a file of a kilobyte asks for, be it a
bytearray of 6 GB, and ends the process at tuples nested 300,000 deep.

``torch.save`` writes a zip archive: ``data.pkl`` names classes and functions of its author, and ``data/0``,
``data/1``, ... are the bytes of tensors. Before torch 1.6 it wrote five pickles (a magic number, a version, the
machine, the object, the numbers of its storages), and the storages after them.

Here every class is a shell that keeps what it is given, and of all functions only those that rebuild tensors and
numpy's arrays are known; of a whole module, parameters and buffers are then read off the shells.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qface.errors import CheckpointError, LimitError, one_line
from qface.limits import Allowance, elements_of, named
from qface.pickles.arrays import ArrayUnpickler
from qface.pickles.check import check_pickle

__all__ = ["UnknownTensor", "is_pickled_module", "module_tensors", "read_pickled_module", "read_torch_file"]

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
_MOST = 100_000  # modules: those within two others count twice, and in many levels without end
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT = struct.Struct("<q")


def read_torch_file(path: str | Path) -> Any:
    """The object in the torch file ``path``, with a shell in the place of whatever is no tensor, array or plain value.

    Raises:
        CheckpointError: it is no such file, or is damaged.
        LimitError: it asks for more depth, objects or memory than :mod:`qface.limits` allows.
    """
    try:
        with named(path):
            allowance = Allowance(
                "the checkpoint", 2 * os.path.getsize(path)
            )  # each number lies in a storage and a tensor
            if not zipfile.is_zipfile(path):
                return _read_legacy(path, allowance)
            with zipfile.ZipFile(path) as archive:
                return _Unpickler.of(archive, allowance).load()
    except LimitError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes may make zipfile, pickle and torch raise anything
        raise CheckpointError(f"{path} is no complete torch file ({one_line(error, 200)}); fetch it again") from error


def read_pickled_module(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of the module in ``path``, by their names in its ``state_dict``.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds no module.
    """
    root = read_torch_file(path)
    if not is_pickled_module(root):
        raise CheckpointError(
            f"{path} holds more than tensors and is no module either, and qface does not run code from files; "
            "save its state_dict() and load that"
        )
    return module_tensors(root, path)


def is_pickled_module(value: Any) -> bool:
    """True of what stands for a module, with its parameters or those of modules within it."""
    return isinstance(value, _Shell) and isinstance(value.state.get("_modules"), dict)


def module_tensors(root: Any, path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of what stands for a module, by their names in its ``state_dict``.

    Raises:
        CheckpointError: it holds tensors of an unknown kind, or more modules than any network.
    """
    tensors: dict[str, Tensor] = {}
    for number, (prefix, shell) in enumerate(_modules(root, "", 0)):
        if number == _MOST:
            raise CheckpointError(f"{path} holds more than {_MOST} modules; save model.state_dict() and load that")
        tensors |= {f"{prefix}{name}": tensor for name, tensor in _tensors(shell)}
    return tensors


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


class UnknownTensor(_Shell):
    """Stands for a sparse, nested, quantized or meta tensor."""


class _TensorUnpickler(ArrayUnpickler):
    """One that knows how tensors are rebuilt, and gives a shell for whatever else is named."""

    def __init__(self, file: IO[bytes], allowance: Allowance) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowance = allowance

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for ``module.name``."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            is_tensor = module == "torch._utils" and name.startswith("_rebuild_")
            return UnknownTensor if is_tensor else _Shell

    def _rebuild_tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """A view of ``storage``; it counts as what a copy of it takes, since views may repeat the same numbers."""
        self._allowance.spend(elements_of(size, "a tensor") * storage.itemsize)
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def _storage_type(self, kind: Any, dtype: Any, key: Any) -> torch.dtype:
        if kind != "storage":
            raise pickle.UnpicklingError(f"it names {kind!r} where a storage is expected")
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                "it holds a complex or float8 tensor, or one of another type that is not read; convert it to float32"
            )
        return dtype


class _Unpickler(_TensorUnpickler):
    """The object of a zip archive."""

    @classmethod
    def of(cls, archive: zipfile.ZipFile, allowance: Allowance) -> _Unpickler:
        (pickled,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("its parts are compressed, as torch never writes them")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = io.BytesIO(archive.read(pickled))
        check_pickle(content)
        unpickler = cls(content, allowance)
        unpickler._archive, unpickler._folder, unpickler._storages = archive, folder, {}
        return unpickler

    _archive: zipfile.ZipFile
    _folder: str
    _storages: dict[tuple[str, torch.dtype], Tensor]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if not str(key).isdecimal():
            raise pickle.UnpicklingError("a storage in it has no number")
        values = self._storage(str(key), self._storage_type(kind, dtype, key))
        if len(values) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} numbers, not {count}")
        return values

    def _storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """The numbers of one file, read once however many tensors look at them."""
        if (key, dtype) not in self._storages:
            part = self._archive.getinfo(f"{self._folder}data/{key}")
            self._allowance.spend(part.file_size)
            content = bytearray(self._archive.read(part))
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._storages[key, dtype] = values
        return self._storages[key, dtype]


class _LegacyUnpickler(_TensorUnpickler):
    """The object of a file as torch wrote it before 1.6, whose storages are filled after it is read."""

    def __init__(self, file: IO[bytes], allowance: Allowance) -> None:
        super().__init__(file, allowance)
        self.storages: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class with its source code
            return pid[1]
        kind, dtype, key, _, count, view = pid
        dtype = self._storage_type(kind, dtype, key)
        if view is not None:
            raise pickle.UnpicklingError(f"storage {key} is a part of another")
        if str(key) not in self.storages:
            self._allowance.spend(elements_of([count], "a storage") * dtype.itemsize)
            self.storages[str(key)] = torch.zeros(count, dtype=dtype)
        storage = self.storages[str(key)]
        if len(storage) != count or storage.dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key} is of two kinds")
        return storage


def _read_legacy(path: str | Path, allowance: Allowance) -> Any:
    with Path(path).open("rb") as file:
        if _plain(file, allowance) != _LEGACY_MAGIC:
            raise ValueError("it begins with no magic number of torch's")
        _, machine = _plain(file, allowance), _plain(file, allowance)
        if not machine.get("little_endian"):
            raise ValueError("its numbers are big-endian")
        check_pickle(file)
        unpickler = _LegacyUnpickler(file, allowance)
        content = unpickler.load()
        for key in _plain(file, allowance):
            _fill(unpickler.storages[str(key)], file, key)
    return content


def _plain(file: IO[bytes], allowance: Allowance) -> Any:
    """The next pickle of plain values."""
    check_pickle(file)
    return _LegacyUnpickler(file, allowance).load()


def _fill(storage: Tensor, file: IO[bytes], key: str) -> None:
    (count,) = _COUNT.unpack(file.read(_COUNT.size))
    content = bytearray(file.read(len(storage) * storage.dtype.itemsize))
    if count != len(storage) or len(content) != len(storage) * storage.dtype.itemsize:
        raise ValueError(f"storage {key} holds {count} numbers, not {len(storage)}")
    if content:
        storage.copy_(torch.frombuffer(content, dtype=storage.dtype))


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _rebuild_with_attributes(rebuild: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor to which its author has given attributes of Python, as ``nn.Buffer`` does."""
    return rebuild(*arguments)


_KNOWN = {
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def _modules(shell: _Shell, prefix: str, depth: int) -> Iterator[tuple[str, _Shell]]:
    """Stand-ins of a module and of those within it, with the prefixes of their tensors' names."""
    if depth > _DEEPEST:
        raise CheckpointError("a pickled module holds itself; save model.state_dict() and load that")
    yield prefix, shell
    for name, module in _entries(shell, "_modules"):
        if isinstance(module, _Shell):
            yield from _modules(module, f"{prefix}{name}.", depth + 1)


def _tensors(shell: _Shell) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, as its ``state_dict`` has them."""
    passing = shell.state.get("_non_persistent_buffers_set")
    left_out = passing if isinstance(passing, set) else set()
    parameters, buffers = _entries(shell, "_parameters"), _entries(shell, "_buffers")
    for name, value in (*parameters, *((name, value) for name, value in buffers if name not in left_out)):
        if isinstance(value, Tensor):
            yield name, value.contiguous()
        elif value is not None:
            raise CheckpointError(
                f"{name} of a pickled module is a tensor of an unknown kind; save model.state_dict() and load that"
            )


def _entries(shell: _Shell, kind: str) -> list[tuple[str, Any]]:
    found = shell.state.get(kind)
    return [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []
