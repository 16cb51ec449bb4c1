"""Results saved with their settings, so that an interrupted benchmark can resume."""

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
    """Results in ``folder``, one JSON file per name and digest of the settings."""

    folder: Path

    def path(self, name: str, settings: Record, ending: str = "") -> Path:
        """Return the path for ``name`` and ``settings``; different settings give different paths."""
        return self.folder / f"{name}-{digest(canonical(settings))}{ending}"

    def find(self, name: str, settings: Record) -> Record | None:
        """Return the saved result for exactly these settings, or None."""
        path = self.path(name, settings, ".json")
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["result"] if canonical(record["settings"]) == canonical(settings) else None

    def recall(self, name: str, settings: Record, make: Callable[[], Record]) -> Record:
        """Return the saved result; if there is none, call ``make`` and save its result."""
        found = self.find(name, settings)
        if found is None:
            found = make()
            write_json(self.path(name, settings, ".json"), {"settings": settings, "result": found})
        return found

    def recall_array(self, name: str, settings: Record, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the saved array; if there is none, call ``make`` and save its result."""
        path = self.path(name, settings, ".npy")
        if not path.exists():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, make())
        return np.load(path)


def canonical(settings: Record) -> str:
    """Return ``settings`` as JSON with sorted keys, so that equal settings give equal text."""
    return json.dumps(settings, sort_keys=True)


def digest(content: str | bytes) -> str:
    """Return the first 8 hex digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:8]


def digest_of_file(path: Path) -> str:
    """Return the digest of a file; it is cached until size or modification time change."""
    status = path.stat()
    return _digest_of_file(path, status.st_size, status.st_mtime_ns)


@cache
def _digest_of_file(path: Path, *_: int) -> str:
    return digest(path.read_bytes())
