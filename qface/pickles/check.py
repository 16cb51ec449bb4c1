"""Check of a pickle's opcodes before it is unpickled."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from qface.limits import Allowance, check

__all__ = ["check_pickle"]

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_FILLS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_CALLS = frozenset({"REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"})
"""Opcodes that pass their arguments to a function, which may copy them."""
_LINES = {"STRING": 1, "GLOBAL": 2, "INST": 2}
"""Text lines in the argument of these opcodes; before Python 3.12.8 pickletools decodes them as ASCII only."""
_MAX_BITS = 8 * 255
"""Maximum bits of an integer. numpy's random states need 128; a product of many larger integers takes minutes."""
_ENTRY_BYTES = 100  # approximate bytes per entry of a container


def check_pickle(file: IO[bytes]) -> None:
    """Refuse a pickle that asks for far more memory or depth than its own size explains.

    The check simulates the stack and memo without building objects. Python itself checks little: it allocates a memo
    as long as the largest memo index, and hashing deeply nested tuples crashes the process.

    Args:
        file: a seekable file, positioned at the start of the pickle. Its position does not change.

    Raises:
        LimitError: the pickle nests too deep, has too many objects, or lets functions copy too many bytes.
        pickle.UnpicklingError: a memo index exceeds the size of the pickle, or an integer exceeds 255 bytes.
        ValueError: the pickle is damaged.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    machine = _Machine(size)
    for number, (place, opcode, argument) in enumerate(_opcodes(file, start + size)):
        check("objects", number, "the pickle")
        if opcode.name in _PUTS and not 0 <= argument <= size:
            raise pickle.UnpicklingError(f"the memo index at byte {place} is {argument}, in a pickle of {size} bytes")
        if opcode.name == "FRAME" and argument > size:
            raise ValueError(f"the frame at byte {place} has {argument} bytes, in a pickle of {size} bytes")
        if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
            raise pickle.UnpicklingError(f"the integer at byte {place} has {argument.bit_length()} bits")
        machine.step(opcode, argument)
    file.seek(start)


@dataclass
class _Value:
    """An object that the pickle would build.

    Args:
        depth: levels of nested objects inside it.
        size: its own bytes.
        inner: bytes of the objects that it holds directly.
    """

    depth: int = 0
    size: int = 0
    inner: int = 0

    def hold(self, values: list[_Value]) -> None:
        """Add ``values`` as entries of this container."""
        self.depth = max(self.depth, 1 + max((each.depth for each in values), default=-1))
        self.size += _ENTRY_BYTES * len(values)
        self.inner += sum(each.size for each in values)


class _Machine:
    """Stack and memo of the unpickler, with a :class:`_Value` in place of each object."""

    def __init__(self, size: int) -> None:
        self._stack: list[_Value | None] = []  # None is a mark
        self._memo: dict[int, _Value] = {}
        self._copied = Allowance("the pickle", size)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Simulate one opcode."""
        name = opcode.name
        if name == "MARK":
            self._stack.append(None)
        elif name in _PUTS or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in _GETS:
            self._stack.append(self._get(argument))
        elif name == "DUP":
            self._stack.append(self._top())
        else:
            self._build(opcode, argument)

    def _build(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        values = self._pop_arguments(opcode)
        if opcode.name in _CALLS:
            self._copied.spend(sum(each.size + each.inner for each in values))
        if opcode.name in _FILLS:
            self._top().hold(values)
            check("depth", self._top().depth, "the pickle")
        elif opcode.stack_after:
            built = _Value(size=len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0)
            built.hold(values)
            check("depth", built.depth, "the pickle")
            self._stack.append(built)

    def _pop_arguments(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """Pop the arguments of ``opcode``; a container that it fills stays on the stack."""
        before = list(opcode.stack_before)
        if pickletools.stackslice in before or opcode.name == "POP_MARK":
            return self._pop_to_mark()
        count = len(before) - (opcode.name in _FILLS)
        values = [self._stack.pop() for _ in range(min(count, len(self._stack)))]
        return [each for each in values if each is not None]

    def _pop_to_mark(self) -> list[_Value]:
        values: list[_Value] = []
        while self._stack:
            value = self._stack.pop()
            if value is None:
                return values
            values.append(value)
        raise pickle.UnpicklingError("a mark is missing on its stack")

    def _top(self) -> _Value:
        value = self._stack[-1] if self._stack else None
        if value is None:
            raise pickle.UnpicklingError("it reads a value from an empty stack")
        return value

    def _get(self, index: int) -> _Value:
        if index not in self._memo:
            raise pickle.UnpicklingError(f"it reads memo index {index}, which was never set")
        return self._memo[index]


def _opcodes(file: IO[bytes], end: int) -> Iterator[tuple[int, pickletools.OpcodeInfo, Any]]:
    """Yield position, opcode and argument up to STOP, like ``pickletools.genops``."""
    name, bounded = "", _BoundedFile(file, end)
    while name != "STOP":
        place, code = file.tell(), file.read(1).decode("latin-1")
        if code not in _OPCODES:
            raise ValueError(f"byte {place} is no opcode: {code!r}" if code else "pickle exhausted before seeing STOP")
        opcode = _OPCODES[code]
        name = opcode.name
        yield place, opcode, _argument(bounded, opcode)


class _BoundedFile:
    """A file whose ``read`` never allocates more bytes than the file has left."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        return self._file.read(min(size, self._end - self._file.tell()))


def _argument(file: _BoundedFile, opcode: pickletools.OpcodeInfo) -> Any:
    if opcode.name in _LINES:
        return b"".join(file.readline() for _ in range(_LINES[opcode.name]))
    return None if opcode.arg is None else opcode.arg.reader(file)  # type: ignore[arg-type]
