"""Numbered lines of text files, and integers in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qface.errors import ImagesError, QFaceError, one_line
from qface.limits import check, limits

__all__ = ["integer", "numbered_lines", "whole_number"]

_MAX_DIGITS = 18  # fits into int64; int() raises for more than 4,300 digits


def numbered_lines(path: Path, error: type[QFaceError] = ImagesError) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines of ``path`` with their line numbers, starting at 1.

    Raises:
        LimitError: there are too many lines, or a line is too long; see ``objects`` of :mod:`qface.limits`.
        QFaceError: the file cannot be read as text; the exception has the type ``error``.
    """
    longest = limits().objects
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(longest + 1), ""), start=1):
                check("objects", number, f"{path}, with one for each line,")
                check("objects", len(line), f"{path}, line {number}, with one for each character,")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise error(f"there is no file {path}: check the path") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read as text ({one_line(cause)}): pass a text file in UTF-8") from cause


def whole_number(text: str) -> int | None:
    """Parse an integer >= 0; None if ``text`` is not a decimal number of at most 18 digits."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def integer(text: str) -> int | None:
    """Parse an integer, also a negative one; None if ``text`` is not a decimal number of at most 18 digits."""
    number = whole_number(text.removeprefix("-"))
    return -number if number is not None and text.startswith("-") else number
