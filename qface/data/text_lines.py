"""Lines of text files, with the numbers that messages about them need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qface.errors import ImagesError, QFaceError

__all__ = ["numbered_lines"]


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
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} cannot be read as text: {cause}") from cause
