"""Checks of a pickle before it is read at all."""

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
"""Opcodes that hand their arguments to a function, which may copy them."""
_LINES = {"STRING": 1, "GLOBAL": 2, "INST": 2}
"""Lines that the arguments of these opcodes take; pickletools reads them as ASCII only before Python 3.12.8."""
_MOST_BITS = 8 * 255
"""Bits of an integer: one of numpy's random states has 128, and a product of many larger ones takes minutes."""
_ENTRY = 100  # bytes of a container for each entry, about


def check_pickle(file: IO[bytes]) -> None:
    """Refuse what asks for far more than the pickle in ``file`` holds, from where it stands; it is left there.

    The pickle is followed without making its objects. Python itself checks little: it keeps a list as long as the
    greatest number under which something is kept for later, and the hash of deeply nested tuples ends the process.

    Raises:
        LimitError: it nests too deep, makes too many objects, or lets too much be copied.
        pickle.UnpicklingError: it keeps a value under a number that is larger than the pickle, or holds an integer of
            more than 255 bytes.
        ValueError: the pickle is damaged.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    machine = _Machine(size)
    for number, (place, opcode, argument) in enumerate(_opcodes(file, start + size)):
        check("objects", number, "the pickle")
        if opcode.name in _PUTS and not 0 <= argument <= size:
            raise pickle.UnpicklingError(f"at byte {place} it keeps value number {argument}, of {size} bytes in all")
        if opcode.name == "FRAME" and argument > size:
            raise ValueError(f"at byte {place} a frame of {argument} bytes is expected, of {size} in all")
        if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
            raise pickle.UnpicklingError(f"at byte {place} stands an integer of {argument.bit_length()} bits")
        machine.step(opcode, argument)
    file.seek(start)


@dataclass
class _Value:
    """An object that the pickle would make.

    Args:
        depth: levels of objects within it.
        size: bytes of its own.
        inner: bytes of what it directly holds.
    """

    depth: int = 0
    size: int = 0
    inner: int = 0

    def hold(self, values: list[_Value]) -> None:
        """Take up ``values``."""
        self.depth = max(self.depth, 1 + max((each.depth for each in values), default=-1))
        self.size += _ENTRY * len(values)
        self.inner += sum(each.size for each in values)


class _Machine:
    """The stack and memo of a pickle, with :class:`_Value` for objects."""

    def __init__(self, size: int) -> None:
        self._stack: list[_Value | None] = []  # None is a mark
        self._memo: dict[int, _Value] = {}
        self._copied = Allowance("the pickle", size)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do what ``opcode`` does."""
        name = opcode.name
        if name == "MARK":
            self._stack.append(None)
        elif name in _PUTS or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in _GETS:
            self._stack.append(self._kept(argument))
        elif name == "DUP":
            self._stack.append(self._top())
        else:
            self._make(opcode, argument)

    def _make(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        values = self._taken(opcode)
        if opcode.name in _CALLS:
            self._copied.spend(sum(each.size + each.inner for each in values))
        if opcode.name in _FILLS:
            self._top().hold(values)
            check("depth", self._top().depth, "the pickle")
        elif opcode.stack_after:
            made = _Value(size=len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0)
            made.hold(values)
            check("depth", made.depth, "the pickle")
            self._stack.append(made)

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """The values that ``opcode`` takes off the stack; those that fill another leave it there."""
        before = list(opcode.stack_before)
        if pickletools.stackslice in before or opcode.name == "POP_MARK":
            return self._to_mark()
        count = len(before) - (opcode.name in _FILLS)
        values = [self._stack.pop() for _ in range(min(count, len(self._stack)))]
        return [each for each in values if each is not None]

    def _to_mark(self) -> list[_Value]:
        values: list[_Value] = []
        while self._stack:
            value = self._stack.pop()
            if value is None:
                return values
            values.append(value)
        raise pickle.UnpicklingError("it lacks a mark")

    def _top(self) -> _Value:
        value = self._stack[-1] if self._stack else None
        if value is None:
            raise pickle.UnpicklingError("it takes a value where there is none")
        return value

    def _kept(self, number: int) -> _Value:
        if number not in self._memo:
            raise pickle.UnpicklingError(f"it reads value number {number}, which it does not keep")
        return self._memo[number]


def _opcodes(file: IO[bytes], end: int) -> Iterator[tuple[int, pickletools.OpcodeInfo, Any]]:
    """The place, kind and argument of each opcode up to the last, as ``pickletools.genops``."""
    name, bounded = "", _Bounded(file, end)
    while name != "STOP":
        place, code = file.tell(), file.read(1).decode("latin-1")
        if code not in _OPCODES:
            raise ValueError(f"at byte {place} stands {code!r}" if code else "pickle exhausted before seeing STOP")
        opcode = _OPCODES[code]
        name = opcode.name
        yield place, opcode, _argument(bounded, opcode)


class _Bounded:
    """A file that sets no memory aside for more bytes than it has left."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        return self._file.read(min(size, self._end - self._file.tell()))


def _argument(file: _Bounded, opcode: pickletools.OpcodeInfo) -> Any:
    if opcode.name in _LINES:
        return b"".join(file.readline() for _ in range(_LINES[opcode.name]))
    return None if opcode.arg is None else opcode.arg.reader(file)  # type: ignore[arg-type]
