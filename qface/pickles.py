"""What is looked at in a pickle before it is read at all."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["check_pickle"]

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_LINES = {"STRING": 1, "GLOBAL": 2, "INST": 2}
"""How many lines the arguments of these take; pickletools reads them as ASCII only before Python 3.12.8."""


def check_pickle(file: IO[bytes]) -> None:
    """Refuse what asks for far more memory than the pickle in ``file`` takes, from where it stands; it is left there.

    Python keeps a list as long as the greatest number under which something is kept for later, so that one damaged
    byte may ask for 32 GB.

    Raises:
        pickle.UnpicklingError: such a number is larger than the pickle.
        ValueError: the pickle is damaged.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    for place, opcode, argument in _opcodes(file):
        if opcode in _MEMO and not 0 <= argument <= size:
            raise pickle.UnpicklingError(f"at byte {place} it keeps value number {argument}, of {size} bytes in all")
    file.seek(start)


def _opcodes(file: IO[bytes]) -> Iterator[tuple[int, str, Any]]:
    """The place, name and argument of each opcode up to the last, as ``pickletools.genops``."""
    name = ""
    while name != "STOP":
        place, code = file.tell(), file.read(1).decode("latin-1")
        if code not in _OPCODES:
            raise ValueError(f"at byte {place} stands {code!r}" if code else "pickle exhausted before seeing STOP")
        opcode = _OPCODES[code]
        name = opcode.name
        yield place, name, _argument(file, opcode)


def _argument(file: IO[bytes], opcode: pickletools.OpcodeInfo) -> Any:
    if opcode.name in _LINES:
        return [file.readline() for _ in range(_LINES[opcode.name])]
    return None if opcode.arg is None else opcode.arg.reader(file)
