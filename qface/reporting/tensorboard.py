"""The verb ``write_tensorboard``: a training log as an event file of TensorBoard (extra ``qface[tensorboard]``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from qface.errors import DependencyError
from qface.files import as_path, make_folder, replacing
from qface.reporting.run_files import read_training, training_log

__all__ = ["write_tensorboard"]

_FILE = "events.out.tfevents.qface"
"""Name of the event file; TensorBoard finds it by ``tfevents``."""
_VERSION = "brain.Event:2"  # of the format, in the first event of a file


def write_tensorboard(source: str | Path, folder: str | Path) -> Path:
    """Write the training log of a distillation as an event file of TensorBoard.

    Each value of the log (loss, loss terms, learning rate, gradient norm) becomes a scalar over the steps. The file is
    written anew, so that no step is in it twice after a run was resumed. Equal logs give equal files, except for the
    time of the points: the log has none, so all points have the time at which the log was last written.

    Args:
        source: ``log.jsonl`` of a distillation, or the run folder of :func:`qface.distill` or :func:`qface.compress`.
        folder: folder for the event file; it is created if it is missing. Use one folder per run.

    Returns:
        The path of the event file.

    Raises:
        ConfigError: ``source`` has no training log, or the log cannot be read.
        DependencyError: tensorboardX is not installed.
        ExportError: the file cannot be written.

    Example:
        >>> config = qface.DistillConfig(max_steps=2, device="cpu")
        >>> student = qface.distill(student, teacher, "faces/", config, run_dir="run")
        >>> qface.write_tensorboard("run", "events/run").name
        'events.out.tfevents.qface'
    """
    event, record_writer = _formats()
    log = training_log(as_path(source))
    rows = read_training(log)
    path = as_path(folder) / _FILE
    time = log.stat().st_mtime
    make_folder(path.parent)
    with replacing(path) as temporary, closing(record_writer(str(temporary))) as file:
        file.write(event(wall_time=time, file_version=_VERSION).SerializeToString())
        for row in rows:
            summary = {"value": list(_scalars(row))}
            file.write(event(wall_time=time, step=int(row["step"]), summary=summary).SerializeToString())
    return path


def _formats() -> tuple[Any, Any]:
    """Return tensorboardX's classes of an event and of a file of events."""
    try:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
    except ModuleNotFoundError as error:
        raise DependencyError("event files need tensorboardX: pip install 'qface[tensorboard]'") from error
    return Event, RecordWriter


def _scalars(row: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for name, value in row.items():
        if name != "step":
            yield {"tag": name, "simple_value": float(value)}
