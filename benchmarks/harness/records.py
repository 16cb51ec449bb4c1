"""Results on disk, each beside the settings it was made with, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.report_files import write_json
from qface.files import replacing

Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """JSON files in ``folder``: a name, a word for the settings, and what was measured with them."""

    folder: Path

    def path(self, name: str, settings: Record, ending: str = "") -> Path:
        """Where what belongs to ``name`` and ``settings`` lies; other settings have another path."""
        return self.folder / f"{name}-{digest(canonical(settings))}{ending}"

    def find(self, name: str, settings: Record) -> Record | None:
        """What was measured with exactly these settings, or None."""
        path = self.path(name, settings, ".json")
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["result"] if canonical(record["settings"]) == canonical(settings) else None

    def recall(self, name: str, settings: Record, make: Callable[[], Record]) -> Record:
        """What is there already, or else what ``make`` returns, which is written at once."""
        found = self.find(name, settings)
        if found is None:
            found = make()
            write_json(self.path(name, settings, ".json"), {"settings": settings, "result": found})
        return found

    def recall_array(self, name: str, settings: Record, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The same for an array."""
        path = self.path(name, settings, ".npy")
        if not path.exists():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, make())
        return np.load(path)


def canonical(settings: Record) -> str:
    """``settings`` as text that is equal where they are."""
    return json.dumps(settings, sort_keys=True)


def digest(content: str | bytes) -> str:
    """A short word for ``content``."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:8]


def digest_of_file(path: Path) -> str:
    """A short word for what is in a file, which is read again only when it has changed."""
    status = path.stat()
    return _digest_of_file(path, status.st_size, status.st_mtime_ns)


@cache
def _digest_of_file(path: Path, *_: int) -> str:
    return digest(path.read_bytes())
