"""Reading of tensors from torch files without running anything that such a file asks for.

``torch.load`` is not safe even with ``weights_only=True``: it allocates whatever a file of a kilobyte asks for (such as
a bytearray of 6 GB), and tuples nested 300,000 deep crash the process.

``torch.save`` writes a zip archive: ``data.pkl`` names classes and functions, and ``data/0``, ``data/1``, ... hold the
storages. Before torch 1.6 it wrote five pickles (magic number, version, machine, object, storage keys), then the
storages.

Only the functions that rebuild tensors and numpy arrays are known. Every other class becomes an :class:`ObjectStandIn`
that keeps the object's state, from which :mod:`qface.pickles.modules` reads the parameters of a pickled module.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qface.archives import opened
from qface.errors import CheckpointError, LimitError, one_line
from qface.limits import Allowance, elements_of, named
from qface.pickles.arrays import ArrayUnpickler

__all__ = ["ObjectStandIn", "UnknownTensor", "read_torch_file"]

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT = struct.Struct("<q")


def read_torch_file(path: str | Path) -> Any:
    """Read the object that ``torch.save`` wrote.

    Classes other than tensors, arrays and plain values become stand-ins.

    Args:
        path: a ``.pth`` or ``.pt`` file.

    Raises:
        CheckpointError: the file is no torch file, or is damaged.
        LimitError: the file asks for more depth, objects or memory than :mod:`qface.limits` allows.
    """
    try:
        with named(path):
            # Each number takes memory in its storage and in one tensor.
            allowance = Allowance("the checkpoint", 2 * os.path.getsize(path))
            if not zipfile.is_zipfile(path):
                return _read_legacy(path, allowance)
            with opened(path) as archive:
                return _ArchiveUnpickler.of(archive, allowance).load()
    except LimitError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes may make zipfile, pickle and torch raise anything
        raise CheckpointError(f"{path} is no complete torch file ({one_line(error, 200)}); fetch it again") from error


class ObjectStandIn:
    """A stand-in for an object of any class: it stores the object's state and ignores all calls."""

    def __new__(cls, *args: Any, **kwargs: Any) -> ObjectStandIn:
        """Accept the arguments of any constructor."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def _ignore(self, *args: Any) -> None:
        pass

    # pickle calls these to fill subclasses of dict, list and set.
    __setitem__ = append = extend = add = _ignore


class UnknownTensor(ObjectStandIn):
    """A stand-in for a sparse, nested, quantized or meta tensor."""


class _TensorUnpickler(ArrayUnpickler):
    """An unpickler that rebuilds tensors and arrays, and uses stand-ins for all other classes."""

    def __init__(self, file: IO[bytes], allowance: Allowance) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowance = allowance

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or stand-in for ``module.name``."""
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
            return UnknownTensor if is_tensor else ObjectStandIn

    def _rebuild_tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """Return a view of ``storage``, counted as a copy, since a view may repeat elements."""
        self._allowance.spend(elements_of(size, "a tensor") * storage.itemsize)
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def _storage_dtype(self, kind: Any, dtype: Any) -> torch.dtype:
        if kind != "storage":
            raise pickle.UnpicklingError(f"it names {kind!r} where a storage is expected")
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                "it holds a tensor of an unsupported dtype, such as complex or float8; convert it to float32"
            )
        return dtype


class _ArchiveUnpickler(_TensorUnpickler):
    """An unpickler of the zip archives that torch writes since 1.6."""

    @classmethod
    def of(cls, archive: zipfile.ZipFile, allowance: Allowance) -> _ArchiveUnpickler:
        """Return the unpickler of ``data.pkl`` in ``archive``."""
        (pickled,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("its entries are compressed, which torch never does")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        unpickler = cls(io.BytesIO(archive.read(pickled)), allowance)
        unpickler._archive, unpickler._folder, unpickler._storages = archive, folder, {}
        return unpickler

    _archive: zipfile.ZipFile
    _folder: str
    _storages: dict[tuple[str, torch.dtype], Tensor]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that ``pid`` names."""
        kind, dtype, key, _, count = pid
        if not str(key).isdecimal():
            raise pickle.UnpicklingError("a storage in it has no number")
        values = self._storage(str(key), self._storage_dtype(kind, dtype))
        if len(values) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} numbers, not {count}")
        return values

    def _storage(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return the storage of entry ``data/key``, read only once."""
        if (key, dtype) not in self._storages:
            part = self._archive.getinfo(f"{self._folder}data/{key}")
            self._allowance.spend(part.file_size)
            content = bytearray(self._archive.read(part))
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._storages[key, dtype] = values
        return self._storages[key, dtype]


class _LegacyUnpickler(_TensorUnpickler):
    """An unpickler of files from before torch 1.6, whose storages are filled after the object is read."""

    def __init__(self, file: IO[bytes], allowance: Allowance) -> None:
        super().__init__(file, allowance)
        self.storages: dict[str, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that ``pid`` names, still empty, or the class of a module."""
        if pid[0] == "module":  # a class with its source code
            return pid[1]
        kind, dtype, key, _, count, view = pid
        dtype = self._storage_dtype(kind, dtype)
        if view is not None:
            raise pickle.UnpicklingError(f"storage {key} is a view of another storage")
        if str(key) not in self.storages:
            self._allowance.spend(elements_of([count], "a storage") * dtype.itemsize)
            self.storages[str(key)] = torch.zeros(count, dtype=dtype)
        storage = self.storages[str(key)]
        if len(storage) != count or storage.dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key} occurs with two sizes or dtypes")
        return storage


def _read_legacy(path: str | Path, allowance: Allowance) -> Any:
    with Path(path).open("rb") as file:
        if _next_pickle(file, allowance) != _LEGACY_MAGIC:
            raise ValueError("it does not begin with torch's magic number")
        _, machine = _next_pickle(file, allowance), _next_pickle(file, allowance)
        if not machine.get("little_endian"):
            raise ValueError("its numbers are big-endian")
        unpickler = _LegacyUnpickler(file, allowance)
        content = unpickler.load()
        for key in _next_pickle(file, allowance):
            _fill(unpickler.storages[str(key)], file, key)
    return content


def _next_pickle(file: IO[bytes], allowance: Allowance) -> Any:
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
    """Rebuild a tensor with Python attributes, such as an ``nn.Buffer``, without the attributes."""
    return rebuild(*arguments)


_KNOWN = {
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
