"""Run folders: locked against other processes, and bound to the inputs of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qface.errors import CheckpointError, ConfigError
from qface.files import alone_in, make_folder, replacing
from qface.limits import MALFORMED, read_json

__all__ = ["run_folder"]

_INPUTS = ".inputs.json"  # hidden, as the lock is: a folder of images ignores both
_CURE = "delete it, or choose another run folder"


@contextmanager
def run_folder(path: Path, inputs: Mapping[str, object], state: str | None = None) -> Iterator[None]:
    """Lock the folder ``path`` until the end of the block, and refuse one that belongs to a run with other inputs.

    Args:
        path: the folder; it is created if it is missing.
        inputs: value or digest of each input of the run, by its name in words.
        state: name of the file in which the run stores its state; without it, a folder of other inputs is taken over.
            None takes over none.

    Raises:
        CheckpointError: the record of the inputs is damaged.
        ConfigError: the folder belongs to a run with other inputs, or another run is using it.
        ExportError: the folder cannot be created or written to.
        LimitError: the record exceeds :mod:`qface.limits`.
    """
    make_folder(path)
    with alone_in(path):
        record, text = path / _INPUTS, json.dumps(dict(inputs))
        if not record.exists() or not (state is None or (path / state).exists()):
            with replacing(record) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        _check_inputs(record, json.loads(text))
        yield


def _check_inputs(record: Path, inputs: Mapping[str, object]) -> None:
    try:
        before = read_json(record, "the record")
        names = before.keys()
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{record} is damaged: {_CURE}") from error
    if names != inputs.keys():
        raise ConfigError(f"{record.parent} belongs to a run of another function: {_CURE}")
    other = [name for name in inputs if before[name] != inputs[name]]
    if other:
        raise ConfigError(f"{record.parent} belongs to a run with different {other[0]}: {_CURE}")
