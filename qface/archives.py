"""Zip archives of checkpoints and exported programs, opened within the limits of :mod:`qface.limits`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qface.limits import check

__all__ = ["names_in", "opened"]

_ENTRY_SIGNATURE = b"PK\x01\x02"
_BYTES_PER_ENTRY = 1024  # of zipfile's object for an entry, rounded up
_BLOCK = 2**20


@contextmanager
def opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive after checking how many entries it may have.

    Raises:
        LimitError: the directory of the archive takes more memory than the limit ``bytes``.
        zipfile.BadZipFile: the file is no complete archive.
    """
    if zipfile.is_zipfile(path):  # reads the end only; any other file, however large, is refused below
        check("bytes", _BYTES_PER_ENTRY * _max_entries(path), str(path))
    with zipfile.ZipFile(path) as archive:
        yield archive


def names_in(path: str | Path) -> list[str]:
    """Return the names in a zip archive; an empty list if the file is not a complete one.

    Raises:
        LimitError: the directory of the archive takes more memory than the limit ``bytes``.
    """
    try:
        with opened(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def _max_entries(path: str | Path) -> int:
    """Count the signature with which each entry of the directory begins, which zipfile would read all at once."""
    count, kept = 0, b""
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            count += (kept + block).count(_ENTRY_SIGNATURE)
            kept = block[-len(_ENTRY_SIGNATURE) + 1 :]
    return count
