"""Files of a stopped run's state: written whole, checked when they are read."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qface.archives import opened
from qface.errors import CheckpointError, ExportError, LimitError
from qface.files import replacing

__all__ = ["read_checkpoint", "restoring", "write_checkpoint"]


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically, so that a crash leaves the old file or the new one.

    Args:
        path: the file.
        content: tensors and plain values, in dicts and lists. Equal content gives equal bytes.

    Raises:
        ExportError: the file cannot be written.
    """
    # Given a path, torch would store its name in the file.
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(_interned(dict(content)), file)
        except RuntimeError as error:  # torch's error for a full disk
            raise ExportError(f"cannot write all of {path}: make room on the disk") from error


def read_checkpoint(path: Path) -> Any:
    """Return the content of ``path``, with tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged.
        LimitError: the file exceeds a limit of :mod:`qface.limits`.
    """
    with restoring(path):
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn errors while the checkpoint ``path`` is read or its state is restored into one line.

    Raises:
        CheckpointError: the block failed.
        LimitError: the file exceeds a limit of :mod:`qface.limits`.
    """
    try:
        yield
    except (LimitError, MemoryError, torch.cuda.OutOfMemoryError):  # the file may be complete
        raise
    except Exception as error:  # torch checks little, so damaged bytes may raise anything
        raise CheckpointError(f"{path} is damaged: delete it to start over") from error


def _interned(value: Any) -> Any:
    """Share equal strings: pickle stores an object once, so resumed runs write the same bytes."""
    if type(value) is dict:
        return {_interned(key): _interned(each) for key, each in value.items()}
    if type(value) is list:
        return [_interned(each) for each in value]
    return sys.intern(value) if type(value) is str else value


def _check_sums(path: Path) -> None:
    """Check the CRC-32 sums in the archive ``path``, which torch writes but does not check.

    Raises:
        zipfile.BadZipFile: a sum differs, or the file is no archive.
    """
    with opened(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
