"""Resource limits of input files; every reader checks them before it allocates or computes.

A file of a few kilobytes can reference one array 20,000 times, nest tuples 300,000 deep or declare images of 20,000 x
20,000 pixels. The limits are far above what face networks and their data need. For a trusted file, increase them with
an environment variable: ``QFACE_LIMITS=depth=500,bytes=4e9``.
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

__all__ = ["MALFORMED", "Allowance", "Limits", "check", "elements_of", "limits", "named", "parse_json", "read_json"]

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of code that takes the fields of a record from a file: any of them may be missing, of another type, or NaN."""

_VARIABLE = "QFACE_LIMITS"
_MAX_DIMENSIONS = 64  # the limit of numpy; torch's is close
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


@dataclass(frozen=True)
class Limits:
    """Maximum resources that one file may use.

    Args:
        depth: nesting depth of containers in a pickle or in JSON.
        objects: number of objects in a pickle, values in JSON, array elements that become Python objects, lines of a
            list, or characters of one of its lines.
        bytes: memory beyond the file size, for computed constants, copies, repeated arrays and batches of fixed size.
        activations: bytes of the activations that a network holds at once for one image.
        operators: number of nodes of a network.
        photo: pixels of a photo to align.
        image: pixels of an input image of a network.
        multiplications: number of multiplications when constants are folded.
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
    """Return the limits: the defaults, changed by the environment variable ``QFACE_LIMITS``.

    Raises:
        ConfigError: the variable has an unknown name or an invalid number.
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
                f"{_VARIABLE} has the invalid entry {entry!r}: write NAME=NUMBER with a number >= 1 and one of the "
                f"names {', '.join(known)}"
            )
    return replace(Limits(), **changes)


def check(limit: str, amount: float, what: str) -> None:
    """Raise if ``amount`` exceeds a limit.

    Args:
        limit: name of a field of :class:`Limits`.
        amount: the amount needed.
        what: subject of the error message, such as a file.

    Raises:
        LimitError: ``amount`` exceeds the limit, or is NaN.
    """
    allowed = getattr(limits(), limit)
    if not amount <= allowed:
        raise _exceeded(limit, amount, allowed, what)


def _exceeded(limit: str, amount: float, allowed: float, what: str) -> LimitError:
    return LimitError(
        f"{what} needs {amount:.4g} {_UNITS[limit]}, but the limit is {allowed:.4g}; if you trust the file, set the "
        f"environment variable {_VARIABLE}={limit}=NUMBER"
    )


_UNITS = {
    "depth": "levels of nesting",
    "objects": "objects",
    "bytes": "bytes beyond the file size",
    "activations": "bytes for one image",
    "operators": "operators",
    "photo": "pixels in a photo",
    "image": "pixels in an image",
    "multiplications": "multiplications of constants",
}


def elements_of(shape: Sequence[Any], what: str) -> int:
    """Return the number of elements of ``shape`` after checking that it is a valid shape.

    Raises:
        LimitError: it has more than 64 dimensions.
        ValueError: a size is not an integer in [0, 2^63).
    """
    if len(shape) > _MAX_DIMENSIONS:
        raise LimitError(f"{what} has {len(shape)} dimensions; the maximum is {_MAX_DIMENSIONS}")
    for side in shape:
        if not isinstance(side, int) or not 0 <= side < 2**63:
            raise ValueError(f"{what} has a size that is not an integer >= 0")
    return math.prod(shape)


class Allowance:
    """Counter of the bytes that one file allocates, checked against the limit ``bytes``.

    Args:
        what: subject of the error message, such as a file.
        size: bytes of the file itself, which do not count.
    """

    def __init__(self, what: str, size: float = 0) -> None:
        self._what = what
        self._size = size
        self._spent = 0.0

    def spend(self, size: float) -> None:
        """Count ``size`` bytes before they are allocated.

        Raises:
            LimitError: the total exceeds the limit.
        """
        self._spent += size
        check("bytes", self._spent - self._size, self._what)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Add ``path`` to the message of a LimitError in the block, and turn a MemoryError into a LimitError."""
    try:
        yield
    except LimitError as error:
        text = str(error)
        raise error if str(path) in text else LimitError(f"{path}: {text}") from error
    except MemoryError as error:
        raise LimitError(f"{path} needs more memory than is available; it may be damaged: get it again") from error


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON after checking its nesting depth and number of values.

    Raises:
        LimitError: it is nested too deeply or has too many values.
        ValueError: it is not valid JSON.
    """
    text = text.decode() if isinstance(text, bytes) else text
    check("objects", sum(map(text.count, ",[{")), what)
    check("depth", _depth(text), what)
    return json.loads(text)


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file in UTF-8.

    Raises:
        LimitError: it is nested too deeply or has too many values; the message names ``path``.
        OSError: it cannot be read.
        ValueError: it is not valid JSON.
    """
    with named(path):
        return parse_json(path.read_text(encoding="utf-8"), what)


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
