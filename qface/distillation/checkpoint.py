"""Run folder: a checkpoint to resume from, and a log with one line of JSON per step."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qface.checkpoint_file import read_checkpoint, restoring, write_checkpoint
from qface.data.content_digest import digest_of_images
from qface.data.images import ImageSource
from qface.distillation.distill_config import DistillConfig
from qface.errors import CheckpointError, ConfigError, ExportError, TrainingError
from qface.files import alone_in, check_folder, make_folder, replacing, sync
from qface.model_digest import digest_of_structure, digest_of_values

__all__ = ["CHECKPOINT", "TrainingRun", "check_run_folder", "training_run"]

_LOGGER = logging.getLogger("qface")

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in a run folder."""
_FORMAT = 2  # of the checkpoint; 1, which did not say so, held flat settings
_LOG = "log.jsonl"
_STUDENT = "student weights"
_LENGTH = ("epochs", "max_steps")  # may grow when a run is resumed
_FREE_TO_CHANGE = ("checkpoint_every", "device", "num_workers")
_PARTS = ("config", "inputs", "state")
_PLAIN = (int, float, str, type(None))
_STATE = {"step": int, "total": int, "student": dict, "objective": dict, "optimizer": dict}


def check_run_folder(path: Path, resume: bool) -> None:
    """Check, without creating anything, that a run can start or resume in the folder ``path``.

    Args:
        path: the run folder.
        resume: True if a checkpoint in it is to be resumed.

    Raises:
        ConfigError: the folder holds a checkpoint and ``resume`` is False.
        ExportError: the folder cannot be created or written to.
    """
    if os.path.exists(path / CHECKPOINT):
        if not resume:
            raise ConfigError(
                f"{path} already holds a run: resume it (--resume, resume=True), delete it, or choose another folder"
            )
        return  # it may be finished, and then nothing is written
    if os.path.exists(path):
        written = [path / CHECKPOINT, path / _LOG]
    else:
        written = [next(folder for folder in (path, *path.parents) if os.path.exists(folder.parent))]
    for each in written:
        check_folder(each)


@contextmanager
def training_run(
    path: Path, config: DistillConfig, student: nn.Module, teacher: nn.Module, source: ImageSource, writes: bool
) -> Iterator[TrainingRun]:
    """Open the run folder ``path`` and lock it against other runs until the end of the block.

    Args:
        path: the folder; it is created if it is missing.
        config: settings of the run.
        student: the student before training.
        teacher: the teacher.
        source: the training images, which are all read once.
        writes: True in the one process that writes and holds the lock.

    Raises:
        ConfigError: another run holds the lock.
        ExportError: the folder cannot be created.
        ImagesError: an image cannot be read.
    """
    if writes:
        make_folder(path)
    with alone_in(path) if writes else nullcontext():
        inputs = {
            "student layers": digest_of_structure(student),
            _STUDENT: digest_of_values(student),
            "teacher weights": digest_of_values(teacher),
            "images": digest_of_images(source),
        }
        yield TrainingRun(path, config, inputs, student, writes)


class TrainingRun:
    """Checkpoint and log of a run; open it with :func:`training_run`.

    Args:
        path: the folder, which exists.
        config: settings of the run.
        inputs: digests of student, teacher and images by name.
        student: the student before training.
        writes: True if this process writes.

    Attributes:
        is_longer: True after a checkpoint of a run with fewer epochs or steps was loaded.
    """

    def __init__(
        self, path: Path, config: DistillConfig, inputs: Mapping[str, str], student: nn.Module, writes: bool
    ) -> None:
        self._checkpoint = path / CHECKPOINT
        self._log = path / _LOG
        self._config = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
        self._inputs = dict(inputs)
        self._student = student
        self._writes = writes
        self.is_longer = False

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state, on the CPU, or None if there is no checkpoint.

        Raises:
            CheckpointError: the file is damaged, or another version of qface wrote it.
            ConfigError: the run had other settings.
            TrainingError: the run had other networks or images.
        """
        if not self._checkpoint.exists():
            return None
        saved = self._read()
        self._require_same_config(saved["config"])
        state: dict[str, Any] = saved["state"]
        self._require_same_inputs(saved["inputs"], state["student"])
        self.is_longer = any(saved["config"].get(name) != self._config[name] for name in _LENGTH)
        if self.is_longer:
            was, now = (", ".join(f"{name}={of[name]}" for name in _LENGTH) for of in (saved["config"], self._config))
            _LOGGER.warning(
                "%s was started with %s and continues to %s: from step %d on, the learning rates are those of the "
                "longer schedule",
                *(self._checkpoint, was, now, state["step"]),
            )
        return state

    def _read(self) -> dict[str, Any]:
        saved = read_checkpoint(self._checkpoint)
        if not _is_checkpoint(saved):
            raise CheckpointError(f"{self._checkpoint} is no checkpoint of a distillation: choose another run folder")
        if (found := saved.get("format", 1)) != _FORMAT:
            raise CheckpointError(
                f"{self._checkpoint} has format {found}, but this version of qface resumes format "
                f"{_FORMAT}: finish the run with the version that started it, or choose another run folder"
            )
        return dict(saved)

    def restoring(self) -> AbstractContextManager[None]:
        """Turn errors while the state is restored into a :class:`~qface.errors.CheckpointError` of one line."""
        return restoring(self._checkpoint)

    def _require_same_config(self, saved: dict[str, Any]) -> None:
        longer = _is_longer(saved, self._config)
        was, now = _flat(saved), _flat(self._config)
        differing = [
            name
            for name in dict.fromkeys((*now, *was))
            if was.get(name) != now.get(name) and not (longer and name in _LENGTH)
        ]
        if differing:
            before, after = (", ".join(f"{name}={each.get(name)!r}" for name in differing) for each in (was, now))
            raise ConfigError(
                f"{self._checkpoint} was made with {before}, not {after}: repeat that (more epochs are allowed), or "
                "choose another folder"
            )

    def _require_same_inputs(self, saved: dict[str, str], trained: Mapping[str, Any]) -> None:
        for name, digest in self._inputs.items():
            if saved.get(name) != digest and not (name == _STUDENT and _holds(self._student, trained)):
                raise TrainingError(
                    f"{self._checkpoint} was made with other {name}: pass the original ones, or choose another folder"
                )

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically, so that a crash leaves the old one or the new one.

        Args:
            state: step, total, and the states of student, objective and optimizer.

        Raises:
            ExportError: the file cannot be written.
        """
        if not self._writes:
            return
        if self._log.exists():
            sync(self._log)  # or, after a power failure, the checkpoint could be ahead of the log
        content = {"format": _FORMAT, "config": self._config, "inputs": self._inputs, "state": state}
        write_checkpoint(self._checkpoint, content)

    def begin_log(self, step: int) -> None:
        """Cut the log after the first ``step`` lines; a killed run may have logged more steps than it saved.

        Args:
            step: number of steps in the checkpoint.

        Raises:
            ExportError: the log cannot be written.
        """
        if not self._writes:
            return
        with replacing(self._log) as temporary:
            lines = self._log.read_bytes().splitlines(keepends=True)[:step] if self._log.exists() else []
            temporary.write_bytes(b"".join(lines))

    def log(self, record: Mapping[str, float]) -> None:
        """Append one line to the log.

        Args:
            record: values of the step by name.

        Raises:
            ExportError: the log cannot be written.
        """
        if not self._writes:
            return
        try:
            with self._log.open("a") as file:
                file.write(json.dumps(dict(record)) + "\n")
        except OSError as error:
            raise ExportError(
                f"cannot write {self._log}: {error.strerror or error}; make room, or choose another run folder"
            ) from error


def _holds(student: nn.Module, trained: Mapping[str, Any]) -> bool:
    """True if ``student`` has the values ``trained``, as after this run in the same process."""
    own = student.state_dict()
    return own.keys() == trained.keys() and all(
        torch.equal(value.cpu(), trained[name]) for name, value in own.items() if isinstance(value, Tensor)
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted names, such as ``optimizer.learning_rate``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _is_longer(saved: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """True if ``config`` trains at least as many epochs and steps as ``saved``; None is unlimited."""
    if not all(isinstance(saved.get(name), int | None) for name in _LENGTH):
        return False
    return all(config[name] is None or (saved[name] is not None and config[name] >= saved[name]) for name in _LENGTH)


def _is_checkpoint(saved: Any) -> bool:
    """True if ``saved`` has the structure and types that :meth:`TrainingRun.save` writes."""
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in _PARTS):
        return False
    typed = isinstance(saved.get("format", 1), int) and _is_plain(saved["config"])
    return typed and all(isinstance(saved["state"].get(name), kind) for name, kind in _STATE.items())


def _is_plain(settings: Mapping[Any, Any]) -> bool:
    """True if ``settings`` are plain values by name, with at most one level of nesting."""
    groups = [value for value in settings.values() if isinstance(value, dict)]
    flat = all(isinstance(value, (*_PLAIN, dict)) for value in settings.values())
    return flat and all(isinstance(value, _PLAIN) for group in groups for value in group.values())
