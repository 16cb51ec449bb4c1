"""What is looked at in a pickle before it is read at all."""

from __future__ import annotations

import os
import pickle
import pickletools
from typing import IO

__all__ = ["check_pickle"]

_MEMO = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


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
    for opcode, argument, place in pickletools.genops(file):
        if opcode.name in _MEMO and not 0 <= (argument or 0) <= size:
            raise pickle.UnpicklingError(f"at byte {place} it keeps value number {argument}, of {size} bytes in all")
    file.seek(start)
