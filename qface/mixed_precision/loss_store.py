"""Store of measured losses in a run folder, from which an interrupted measurement continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qface.errors import ExportError, LimitError
from qface.files import replacing
from qface.limits import MALFORMED, parse_json
from qface.run_folder import run_folder

__all__ = ["Key", "Losses", "loss_store"]

Key = tuple[int, str, int]
"""Batch index, name of the quantized node, and its bits."""
Losses = dict[Key, float]
"""Loss summed over a batch, for each batch, node and number of bits."""

_FILE = "losses.jsonl"


@contextmanager
def loss_store(folder: Path, inputs: Mapping[str, str]) -> Iterator[Losses]:
    """Open the losses stored in ``folder``; each new loss is also written to disk.

    Args:
        folder: run folder of one measurement; created if missing.
        inputs: digest of each input of the measurement, by name.

    Raises:
        CheckpointError: the record of the inputs is damaged.
        ConfigError: the folder belongs to other inputs, or another run is using it.
        ExportError: the folder cannot be created or written to.
    """
    with run_folder(folder, inputs):
        yield _StoredLosses(folder / _FILE)


class _StoredLosses(Losses):
    """Losses mirrored in the file ``path``, one line per loss."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        stored = list(_parsed(lines))
        self.update(stored)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{_line(each)}\n" for each in stored), encoding="utf-8")

    def __setitem__(self, key: Key, loss: float) -> None:
        super().__setitem__(key, loss)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{_line((key, loss))}\n")
        except OSError as error:
            raise ExportError(
                f"cannot write {self._path}: {error.strerror or error}; make room, or choose another run folder"
            ) from error


def _line(item: tuple[Key, float]) -> str:
    key, loss = item
    return json.dumps([*key, loss])


def _parsed(lines: list[str]) -> Iterator[tuple[Key, float]]:
    """Yield the losses up to the first damaged line, such as the last one of an interrupted run."""
    for line in lines:
        try:
            batch, node, bits, loss = parse_json(line, "a loss")
            yield (int(batch), str(node), int(bits)), float(loss)
        except (LimitError, *MALFORMED):
            return
