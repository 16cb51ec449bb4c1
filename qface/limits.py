"""Limits of what a file may ask for: every reader checks here before it allocates or computes.

A file of a few kilobytes can name one array 20,000 times, nest tuples 300,000 deep or declare images of 20,000 x
20,000. The limits lie far above what face networks and their data need. Who trusts a file that exceeds one raises it
with an environment variable: ``QFACE_LIMITS=depth=500,bytes=4e9``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qface.errors import ConfigError, LimitError

__all__ = ["Allowance", "Limits", "check", "elements_of", "limits", "named", "parse_json"]

_VARIABLE = "QFACE_LIMITS"
_MOST_DIMENSIONS = 64  # as numpy; torch's own limit is close
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


@dataclass(frozen=True)
class Limits:
    """The most that one file may ask for.

    Args:
        depth: levels of containers in containers, in a pickle or in JSON.
        objects: objects in a pickle, values in JSON, or entries of an array that become Python objects.
        bytes: memory beyond the file's own size, for constants that are computed, copies and repeated arrays.
        activations: bytes of the values that a network holds at once for one image.
        operators: nodes of a network.
        photo: pixels of a photo to align.
        image: pixels of an image that a network reads.
        multiplications: in the products of constants.
    """

    depth: int = 200
    objects: int = 2_000_000
    bytes: int = 2**29
    activations: int = 2**27
    operators: int = 10_000
    photo: int = 64_000_000
    image: int = 2**20
    multiplications: int = 2 * 10**9


def limits() -> Limits:
    """The limits in force: the defaults, with what the environment variable ``QFACE_LIMITS`` changes.

    Raises:
        ConfigError: the variable names no limit, or no number.
    """
    return _parsed(os.environ.get(_VARIABLE, ""))


@lru_cache(maxsize=8)
def _parsed(text: str) -> Limits:
    known = [field.name for field in fields(Limits)]
    changes = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = entry.partition("=")
        try:
            changes[name] = int(float(number))
        except (ValueError, OverflowError):
            changes[name] = 0
        if name not in known or changes[name] < 1:
            raise ConfigError(
                f"{_VARIABLE} has the entry {entry!r}: write name=number with a number >= 1 and a name of "
                f"{', '.join(known)}"
            )
    return replace(Limits(), **changes)


def check(limit: str, amount: float, what: str) -> None:
    """Refuse ``what`` where it asks for more than a limit allows.

    Args:
        limit: a field of :class:`Limits`.
        amount: how much it asks for.
        what: who asks, as the subject of a sentence.

    Raises:
        LimitError: ``amount`` exceeds the limit, or is not a number.
    """
    allowed = getattr(limits(), limit)
    if not amount <= allowed:
        raise _exceeded(limit, amount, allowed, what)


def _exceeded(limit: str, amount: float, allowed: float, what: str) -> LimitError:
    return LimitError(
        f"{what} asks for {amount:.4g} {_UNITS[limit]}, and {allowed:.4g} are allowed; if you trust the file, set a "
        f"larger limit in the environment: {_VARIABLE}={limit}=NUMBER"
    )


_UNITS = {
    "depth": "levels of nesting",
    "objects": "objects",
    "bytes": "bytes beyond its size",
    "activations": "bytes for one image",
    "operators": "operators",
    "photo": "pixels in a photo",
    "image": "pixels in an image",
    "multiplications": "multiplications of constants",
}


def elements_of(shape: Sequence[Any], what: str) -> int:
    """The number of elements of ``shape``, multiplied only once it is known to be a shape.

    Raises:
        LimitError: it has more dimensions than any array.
        ValueError: a side is no integer >= 0 of 64 bits.
    """
    if len(shape) > _MOST_DIMENSIONS:
        raise LimitError(f"{what} has {len(shape)} dimensions, and arrays have at most {_MOST_DIMENSIONS}")
    for side in shape:
        if not isinstance(side, int) or not 0 <= side < 2**63:
            raise ValueError(f"{what} has a side that is no integer >= 0")
    return math.prod(shape)


class Allowance:
    """The bytes that one file may still make, beyond its own size.

    Args:
        what: who asks, as the subject of a sentence.
        size: bytes of the file itself.
    """

    def __init__(self, what: str, size: float = 0) -> None:
        self._what = what
        self._size = size
        self._spent = 0.0

    def spend(self, size: float) -> None:
        """Count ``size`` bytes, before they are made.

        Raises:
            LimitError: with them the file has made too many.
        """
        self._spent += size
        check("bytes", self._spent - self._size, self._what)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Let an error about limits name the file that is read, and memory that runs out be such an error."""
    try:
        yield
    except LimitError as error:
        text = str(error)
        raise error if str(path) in text else LimitError(f"{path}: {text}") from error
    except MemoryError as error:
        raise LimitError(f"{path} asks for more memory than there is; fetch it again") from error


def parse_json(text: str | bytes, what: str) -> Any:
    """The value that ``text`` is, which is counted before it is parsed.

    Raises:
        LimitError: it is nested too deep, or has too many values.
        ValueError: it is no JSON.
    """
    text = text.decode() if isinstance(text, bytes) else text
    check("objects", sum(map(text.count, ",[{")), what)
    check("depth", _depth(text), what)
    return json.loads(text)


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
    return deepest
