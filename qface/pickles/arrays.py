"""Unpickling of numbers, bytes and numpy arrays without calling any function that the pickle names.

Unpickling ``numpy.ndarray`` itself is not safe: a crafted pickle can make it take bytes for memory addresses. The
stand-ins here only store their arguments; numpy gets plain numeric bytes, checked against the shape.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from qface.limits import check, elements_of
from qface.pickles.check import check_pickle

__all__ = ["ArrayUnpickler", "PickledArray", "read_pickle"]

_OBJECT = re.compile(r"O\d?")
_PLAIN = re.compile(r"b1|[ui][1248]|f[48]|S\d{1,9}")


def read_pickle(file: IO[bytes]) -> Any:
    """Read a pickle of plain values, bytes and arrays.

    Args:
        file: a seekable file, positioned at the start of the pickle.

    Returns:
        The object; arrays are :class:`PickledArray`, and strings of Python 2 are bytes.

    Raises:
        LimitError: the pickle asks for more depth, objects or memory than :mod:`qface.limits` allows.
        pickle.UnpicklingError: the pickle names any other class or function.
        Exception: a damaged pickle may raise anything.
    """
    return ArrayUnpickler(file, encoding="bytes").load()


class PickledArray:
    """A numpy array as stored in a pickle: dtype, shape and raw content."""

    def __init__(self) -> None:
        self._dtype = _DType("O")
        self._shape: tuple[int, ...] = (0,)
        self._size = 0
        self._content: Any = []
        self._order = "C"

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.fill(content, kind, shape, "F" if is_fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        """Store content, dtype, shape and order, where dtype and shape are valid."""
        if not isinstance(kind, _DType) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array in it has an unknown dtype or order")
        self._size = elements_of(shape, "an array in it")
        self._content, self._dtype, self._order, self._shape = content, kind, order, tuple(shape)

    def elements(self) -> Sequence[Any]:
        """Return the entries in C order.

        Raises:
            ValueError: the content does not match the shape.
        """
        if self._dtype.is_object:
            return self._objects()
        check("objects", self._size, "an array in it")
        return list(self.values().ravel())

    def bytes(self) -> bytes | bytearray:
        """Return the content of a contiguous uint8 array without a copy, however often the array occurs.

        Raises:
            ValueError: the array is not uint8, not contiguous, or its content does not match the shape.
        """
        values = self.values()
        if values.dtype != np.uint8 or not values.flags.c_contiguous:
            raise ValueError(f"expected a contiguous uint8 array, got {values.dtype} {list(values.shape)}")
        content: bytes | bytearray = self._content
        return content

    def values(self) -> npt.NDArray[Any]:
        """Return the numpy array of numbers or bytes.

        Raises:
            ValueError: the dtype is object, or the content does not match the shape.
        """
        kind, size = self._dtype.plain(), self._size
        if not isinstance(self._content, (bytes, bytearray)) or len(self._content) != size * kind.itemsize:
            raise ValueError(f"an array of shape {list(self._shape)} must have {size * kind.itemsize} bytes")
        return np.frombuffer(self._content, kind, size).reshape(self._shape, order=self._order)  # type: ignore[call-overload, no-any-return]

    def _objects(self) -> Sequence[Any]:
        if not isinstance(self._content, list) or len(self._content) != self._size:
            raise ValueError(f"an array of shape {list(self._shape)} must have {self._size} entries")
        return self._content


class _DType:
    """A stand-in for ``numpy.dtype``: type code, item size and byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order = "="
        if not self.is_object and not _PLAIN.fullmatch(self.code):
            raise pickle.UnpicklingError(f"an array in it has the unsupported dtype {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else str(order)

    @property
    def is_object(self) -> bool:
        return _OBJECT.fullmatch(self.code) is not None

    def plain(self) -> np.dtype[Any]:
        """Return the numpy dtype of numbers or bytes."""
        if self.is_object or self.order not in ("<", ">", "=", "|"):
            raise ValueError("expected an array of numbers, got an array of objects")
        return np.dtype(self.order + self.code)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler with limits that builds only plain values, bytes and :class:`PickledArray`.

    Args:
        file: a seekable file, positioned at the start of the pickle; it is checked before anything is built.
        encoding: how strings of Python 2 are decoded; ``"bytes"`` keeps them.
    """

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        check_pickle(file)
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for ``module.name``.

        Raises:
            pickle.UnpicklingError: the name has no stand-in.
        """
        # Bound methods: a pickle may set attributes of any object that it gets, and methods do not allow that.
        known: dict[str, Callable[..., Any] | type] = {
            "dtype": _DType,
            "ndarray": PickledArray,
            "_reconstruct": self._reconstruct,
            "scalar": self._scalar,
            "_frombuffer": self._from_buffer,
        }
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if name == "bytearray" and module in ("builtins", "__builtin__"):
            return self._bytearray
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        """Encode ``text``; pickle protocols 0 to 2 store bytes of Python 3 this way."""
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
        return text.encode("latin1")

    def _bytearray(self, content: Any = b"", encoding: str = "latin1") -> bytes:
        """Return bytes; a number is refused, since ``bytearray(number)`` allocates that many bytes."""
        if isinstance(content, str):
            return self._encode(content, encoding)
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"it asks for a bytearray of {type(content).__name__}")
        return bytes(content)

    def _reconstruct(self, *_: Any) -> PickledArray:
        """Return an empty array; ``__setstate__`` fills it."""
        return PickledArray()

    def _from_buffer(self, content: Any, kind: Any, shape: Any, order: Any, *_: Any) -> PickledArray:
        """Return an array of pickle protocol 5."""
        array = PickledArray()
        array.fill(content, kind, shape, order)
        return array

    def _scalar(self, kind: Any, content: Any) -> Any:
        return self._from_buffer(content, kind, (), "C").elements()[0]
