"""Numbers, bytes and numpy's arrays out of a pickle, of which nothing is run, numpy's own functions neither.

``numpy.ndarray`` itself takes bytes for addresses where a pickle tells it so. Here whatever rebuilds an array only
writes down what it is given; numpy sees the bytes of plain numbers, as many as the shape asks for.
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
    """Read the object that is pickled in ``file``; Python 2's strings are bytes, arrays :class:`PickledArray`.

    Raises:
        LimitError: it asks for more depth, objects or memory than is allowed.
        pickle.UnpicklingError: it asks for more than bytes, numbers and arrays. Damage may raise anything.
    """
    check_pickle(file)
    return ArrayUnpickler(file, encoding="bytes").load()


class PickledArray:
    """An array as it lies in a pickle."""

    def __init__(self) -> None:
        self._type = _Type("O")
        self._shape: tuple[int, ...] = (0,)
        self._size = 0
        self._content: Any = []
        self._order = "C"

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.fill(content, kind, shape, "F" if is_fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        """Write down what the array is of."""
        if not isinstance(kind, _Type) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array in it is of no known type")
        self._size = elements_of(shape, "an array in it")
        self._content, self._type, self._order, self._shape = content, kind, order, tuple(shape)

    def elements(self) -> Sequence[Any]:
        """Its entries, in the order of rows.

        Raises:
            ValueError: it holds more or fewer than its shape says.
        """
        if self._type.is_object:
            return self._objects()
        check("objects", self._size, "an array in it")
        return list(self.values().ravel())

    def bytes(self) -> bytes | bytearray:
        """Its content as it lies in the pickle, which is not copied, however often the array is named.

        Raises:
            ValueError: it is of no bytes, of several columns, or holds more or fewer than its shape says.
        """
        values = self.values()
        if values.dtype != np.uint8 or not values.flags.c_contiguous:
            raise ValueError(f"a row of bytes is expected, not {values.dtype} {list(values.shape)}")
        content: bytes | bytearray = self._content
        return content

    def values(self) -> npt.NDArray[Any]:
        """The array, of plain numbers or bytes.

        Raises:
            ValueError: it is of objects, or holds more bytes or fewer than its shape says.
        """
        kind, size = self._type.plain(), self._size
        if not isinstance(self._content, (bytes, bytearray)) or len(self._content) != size * kind.itemsize:
            raise ValueError(f"an array of {list(self._shape)} needs {size * kind.itemsize} bytes")
        return np.frombuffer(self._content, kind, size).reshape(self._shape, order=self._order)  # type: ignore[call-overload, no-any-return]

    def _objects(self) -> Sequence[Any]:
        if not isinstance(self._content, list) or len(self._content) != self._size:
            raise ValueError(f"an array of {list(self._shape)} needs as many entries")
        return self._content


class _Type:
    """numpy's ``dtype``: the letter and bytes of a number, and their order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order = "="
        if not self.is_object and not _PLAIN.fullmatch(self.code):
            raise pickle.UnpicklingError(f"it asks for an array of {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else str(order)

    @property
    def is_object(self) -> bool:
        return _OBJECT.fullmatch(self.code) is not None

    def plain(self) -> np.dtype[Any]:
        if self.is_object or self.order not in ("<", ">", "=", "|"):
            raise ValueError("an array of objects is no array of numbers")
        return np.dtype(self.order + self.code)


class ArrayUnpickler(pickle.Unpickler):
    """One that knows how bytes and arrays are rebuilt, and no other function or class."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for ``module.name``.

        Raises:
            pickle.UnpicklingError: it is no part of bytes and arrays.
        """
        # Methods of this object: a pickle may set attributes of whatever it is given, which methods do not allow.
        known: dict[str, Callable[..., Any] | type] = {
            "dtype": _Type,
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
        """Encode ``text``: Python 3 writes bytes in this way in protocols below 3."""
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
        return text.encode("latin1")

    def _bytearray(self, content: Any = b"", encoding: str = "latin1") -> bytes:
        """Make bytes of bytes, or of their text in protocols below 3; a number would make as many bytes as it says."""
        if isinstance(content, str):
            return self._encode(content, encoding)
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"it asks for a bytearray of {type(content).__name__}")
        return bytes(content)

    def _reconstruct(self, *_: Any) -> PickledArray:
        """An array without content; it comes as its state."""
        return PickledArray()

    def _from_buffer(self, content: Any, kind: Any, shape: Any, order: Any, *_: Any) -> PickledArray:
        """An array, as protocol 5 has it."""
        array = PickledArray()
        array.fill(content, kind, shape, order)
        return array

    def _scalar(self, kind: Any, content: Any) -> Any:
        return self._from_buffer(content, kind, (), "C").elements()[0]
