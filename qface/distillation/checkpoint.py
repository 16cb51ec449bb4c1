"""The folder of a run: a checkpoint to go on from, and one line of JSON for every step."""

from __future__ import annotations

import json
import logging
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qface.data.content_digest import digest_of_images
from qface.data.images import ImageSource
from qface.distillation.distill_config import DistillConfig
from qface.errors import CheckpointError, ConfigError, ExportError, TrainingError
from qface.files import alone_in, check_folder, make_folder, replacing, sync
from qface.model_digest import digest_of_structure, digest_of_values

__all__ = ["CHECKPOINT", "RunFolder", "check_run_folder", "run_folder"]

_LOGGER = logging.getLogger("qface")

CHECKPOINT = "checkpoint.pt"
"""Name of the file in a run folder that a stopped run goes on from."""
_LOG = "log.jsonl"
_STUDENT = "student weights"
_LENGTH = ("epochs", "max_steps")  # which may grow
_FREE_TO_CHANGE = ("checkpoint_every", "device")
_PARTS = ("config", "inputs", "state")
_PLAIN = (int, float, str, type(None))
_STATE = {"step": int, "total": int, "student": dict, "objective": dict, "optimizer": dict}


def check_run_folder(path: Path, resume: bool) -> None:
    """Make sure, without making it, that a run can begin or go on in the folder ``path``.

    Raises:
        ConfigError: it holds a checkpoint and ``resume`` is False.
        ExportError: it cannot be made or written to.
    """
    if os.path.exists(path / CHECKPOINT):
        if not resume:
            raise ConfigError(
                f"{path} already holds a run: resume it (--resume, resume=True), delete it, or choose another folder"
            )
        return  # a run that is finished is only read
    if os.path.exists(path):
        written = [path / CHECKPOINT, path / _LOG]
    else:
        written = [next(folder for folder in (path, *path.parents) if os.path.exists(folder.parent))]
    for each in written:
        check_folder(each)


@contextmanager
def run_folder(
    path: Path, config: DistillConfig, student: nn.Module, teacher: nn.Module, source: ImageSource, writes: bool
) -> Iterator[RunFolder]:
    """The folder ``path`` for a run of these networks on these images, which it belongs to until the end of the block.

    Args:
        path: the folder; it is made where it is missing.
        config: settings of the run.
        student: the network that learns, before it does.
        teacher: the network that it learns from.
        source: the images, all of which are read once.
        writes: True in the one process that writes, which keeps other runs out.

    Raises:
        ConfigError: another run is in the folder.
        ExportError: it cannot be made.
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
        yield RunFolder(path, config, inputs, student, writes)


class RunFolder:
    """The files of a run, with which another process can finish it; :func:`run_folder` opens them.

    Args:
        path: the folder, which exists.
        config: settings of the run.
        inputs: a word for each thing the run starts from (student, teacher, images), by its name.
        student: the network as the run starts with it.
        writes: whether this process is the one that writes.

    Attributes:
        is_longer: True once a checkpoint is loaded whose run was begun with fewer epochs or steps.
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
        """The state that was saved last, on the CPU, or None where there is none.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it comes from other settings.
            TrainingError: it comes from other networks or images.
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
                "%s was begun with %s and goes on to %s: from step %d the learning rate is that of the longer "
                "schedule, and what it was before stays",
                *(self._checkpoint, was, now, state["step"]),
            )
        return state

    def _read(self) -> dict[str, Any]:
        with self.restoring():
            _check_sums(self._checkpoint)
            saved: Any = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        if not _is_checkpoint(saved):
            raise CheckpointError(f"{self._checkpoint} is no checkpoint of a distillation: choose another run folder")
        return dict(saved)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around reading the checkpoint, and putting back what it holds.

        Raises:
            CheckpointError: that fails.
        """
        try:
            yield
        except (MemoryError, torch.cuda.OutOfMemoryError):  # of which the checkpoint is innocent
            raise
        except Exception as error:  # torch checks little, so damaged bytes may raise anything
            raise CheckpointError(f"{self._checkpoint} is damaged: delete it to start over") from error

    def _require_same_config(self, saved: dict[str, Any]) -> None:
        longer = _is_longer(saved, self._config)
        differing = [
            name for name in self._config if saved.get(name) != self._config[name] and not (longer and name in _LENGTH)
        ]
        if differing:
            was = ", ".join(f"{name}={saved.get(name)!r}" for name in differing)
            now = ", ".join(f"{name}={self._config[name]!r}" for name in differing)
            raise ConfigError(
                f"{self._checkpoint} was made with {was}, not {now}: repeat that (more epochs are allowed), or choose "
                "another folder"
            )

    def _require_same_inputs(self, saved: dict[str, str], trained: Mapping[str, Any]) -> None:
        for name, word in self._inputs.items():
            if saved.get(name) != word and not (name == _STUDENT and _holds(self._student, trained)):
                raise TrainingError(
                    f"{self._checkpoint} was made with other {name}: give those, or choose another folder"
                )

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint in one move, so that a crash leaves either the old one or the new one.

        Raises:
            ExportError: it cannot be written.
        """
        if not self._writes:
            return
        if self._log.exists():
            sync(self._log)  # or after a power failure the checkpoint could know of steps that the log does not
        # To an open file, since torch would write the name of a path into it.
        with replacing(self._checkpoint) as temporary, temporary.open("wb") as file:
            try:
                torch.save(_interned({"config": self._config, "inputs": self._inputs, "state": state}), file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise ExportError(f"cannot write all of {self._checkpoint}: make room on the disk") from error

    def begin_log(self, step: int) -> None:
        """Keep the log of the first ``step`` steps; a killed run may have written more than it saved.

        Raises:
            ExportError: it cannot be written.
        """
        if not self._writes:
            return
        with replacing(self._log) as temporary:
            lines = self._log.read_bytes().splitlines(keepends=True)[:step] if self._log.exists() else []
            temporary.write_bytes(b"".join(lines))

    def log(self, record: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            ExportError: it cannot be written.
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


def _interned(value: Any) -> Any:
    """``value`` with one object for equal strings: pickle writes such a one once, and those of a resumed run differ."""
    if type(value) is dict:
        return {_interned(key): _interned(each) for key, each in value.items()}
    if type(value) is list:
        return [_interned(each) for each in value]
    return sys.intern(value) if type(value) is str else value


def _holds(student: nn.Module, trained: Mapping[str, Any]) -> bool:
    """True if ``student`` holds the values ``trained``, as one does that this run has trained in this process."""
    own = student.state_dict()
    return own.keys() == trained.keys() and all(
        torch.equal(value.cpu(), trained[name]) for name, value in own.items() if isinstance(value, Tensor)
    )


def _is_longer(saved: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """True if ``config`` trains at least as long as ``saved``, by epochs and by steps; None are any number of these."""
    if not all(isinstance(saved.get(name), int | None) for name in _LENGTH):
        return False
    return all(config[name] is None or (saved[name] is not None and config[name] >= saved[name]) for name in _LENGTH)


def _check_sums(path: Path) -> None:
    """Compare what the archive ``path`` holds with the sums that torch wrote beside it, and never reads.

    Raises:
        zipfile.BadZipFile: they differ, or it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


def _is_checkpoint(saved: Any) -> bool:
    """True if ``saved`` holds what :meth:`RunFolder.save` writes, as far as types tell."""
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in _PARTS):
        return False
    return _is_plain(saved["config"]) and all(
        isinstance(saved["state"].get(name), kind) for name, kind in _STATE.items()
    )


def _is_plain(settings: Mapping[Any, Any]) -> bool:
    """True if ``settings`` are plain values by name, or groups of such."""
    groups = [value for value in settings.values() if isinstance(value, dict)]
    flat = all(isinstance(value, (*_PLAIN, dict)) for value in settings.values())
    return flat and all(isinstance(value, _PLAIN) for group in groups for value in group.values())
