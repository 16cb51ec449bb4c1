"""Lines of text files, with the numbers that messages about them need, and the whole numbers that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qface.errors import ImagesError, QFaceError, one_line

__all__ = ["numbered_lines", "whole_number"]

_MOST_DIGITS = 18  # of numbers that int64 holds; from 4,301 on, int() raises


def numbered_lines(path: Path, error: type[QFaceError] = ImagesError) -> Iterator[tuple[int, str]]:
    """The lines of ``path`` that are not blank, with their numbers from 1.

    Raises:
        QFaceError: it cannot be read as text; of the type ``error``.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise error(f"there is no file {path}: check the path") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read as text ({one_line(cause)}): give a text file in UTF-8") from cause


def whole_number(text: str) -> int | None:
    """The number that ``text`` is, from 0 on; None where it is no decimal one of at most 18 digits."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None
