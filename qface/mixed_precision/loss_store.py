"""Losses of single changes in a run folder, written as they are measured, so that a call that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qface.errors import ConfigError, ExportError
from qface.files import alone_in, make_folder, replacing

__all__ = ["Key", "Losses", "loss_store"]

Key = tuple[int, str, int]
"""Number of the batch, name of the changed node, and its bits."""
Losses = dict[Key, float]
"""The sum of the losses of a batch for each change."""

_FILE = "losses.jsonl"


@contextmanager
def loss_store(folder: Path, inputs: Mapping[str, str]) -> Iterator[Losses]:
    """The losses kept in ``folder``, to which each new one is added on the disk as well.

    Args:
        folder: of one measurement; it is made where it is missing.
        inputs: a word for each thing that is measured, by its name.

    Raises:
        ConfigError: the folder is of other inputs, or another run is in it.
        ExportError: it cannot be made or written to.
    """
    make_folder(folder)
    with alone_in(folder):
        yield _StoredLosses(folder / _FILE, inputs)


class _StoredLosses(Losses):
    """Losses that are also lines of the file ``path``, after one line of ``inputs``."""

    def __init__(self, path: Path, inputs: Mapping[str, str]) -> None:
        super().__init__()
        self._path = path
        header = json.dumps(dict(inputs), sort_keys=True)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else [header]
        if lines[:1] != [header]:
            raise ConfigError(f"{path} is of another model, other images or settings: choose another folder")
        kept = list(_whole(lines[1:]))
        self.update(kept)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in (header, *map(_line, kept))), encoding="utf-8")

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


def _whole(lines: list[str]) -> Iterator[tuple[Key, float]]:
    """The losses of ``lines`` up to the first that is damaged, as the last one of a run that was stopped may be."""
    for line in lines:
        try:
            batch, node, bits, loss = json.loads(line)
            yield (int(batch), str(node), int(bits)), float(loss)
        except (TypeError, ValueError):
            return
