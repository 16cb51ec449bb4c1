"""Writing files so that nothing is lost: a new file appears whole, under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qface.errors import ExportError

__all__ = ["check_folder", "make_folder", "replacing"]

_LONGEST_NAME = 255  # bytes, on the file systems of Linux, macOS and Windows


def check_folder(path: str | Path) -> None:
    """Make sure, before long work, that ``path`` can be written at its end.

    Raises:
        ExportError: its folder does not exist or cannot be written to, its name is too long, or it is something else
            than a file.
    """
    _check_replaceable(Path(path))
    folder = Path(path).parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ExportError(
            f"cannot write {path}: {folder} is no folder that can be written to; choose another or make it"
        )
    if len(os.fsencode(Path(path).name)) > _LONGEST_NAME:
        raise ExportError(f"cannot write {path}: its name has more than {_LONGEST_NAME} bytes; choose a shorter one")


def make_folder(path: str | Path) -> None:
    """Make the folder ``path``, with those that it lies in, where it does not exist.

    Raises:
        ExportError: it cannot be made, or is something else.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot make the folder {path}: {error.strerror or error}; choose another") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, on failure it is removed.

    A link stays, and the file that it points to is replaced.

    Raises:
        ExportError: the folder does not exist or cannot be written to, the disk is full, or ``path`` is something else
            than a file.
    """
    _check_replaceable(Path(path))
    path = Path(os.path.realpath(path))
    try:
        # Not named after the file, whose name may be as long as names can be.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".qface-", suffix=".part")
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}; choose a folder that exists") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_replaceable(path: Path) -> None:
    # A folder would only be in the way, but a device would be gone.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ExportError(f"cannot write {path}: it is a folder or a device; choose the name of a file")


def _umask() -> int:
    # The mask can only be read by setting it; mkstemp's 0600 would surprise whoever shares the file.
    mask = os.umask(0)
    os.umask(mask)
    return mask
