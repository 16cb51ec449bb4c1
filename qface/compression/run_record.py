"""``run.json``: the input and output files of one compression, for :func:`qface.report`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qface.data.identities import FIRST_HALF, SECOND_HALF
from qface.errors import ConfigError, one_line
from qface.files import as_path, make_folder, replacing
from qface.limits import read_json
from qface.results import Result

__all__ = ["RUN_FILE", "RunRecord"]

RUN_FILE = "run.json"
SCHEMA_VERSION = 1

_REQUIRED = ("teacher", "student", "file", "images")
_PATHS = (*_REQUIRED, "pairs", "tuning_people", "eval_people", "sensitivity", "log")
_HALVES = (FIRST_HALF, SECOND_HALF)


@dataclass(frozen=True, repr=False)
class RunRecord(Result):
    """Input and output files of one compression; paths inside the run folder are relative in ``run.json``.

    Args:
        teacher: float network: a file, a name, or ``package.module:factory``.
        student: quantized network (``.safetensors``).
        file: exported file (``.onnx``).
        images: folder of face crops.
        pairs: pair list.
        tuning_people: people that the student was tuned on, as for ``--people``; None means all.
        eval_people: people to evaluate on; None means all.
        sensitivity: JSON file of :meth:`qface.Sensitivity.to_dict`.
        log: ``log.jsonl`` of the distillation.
        trials: one row per trial, all with the same keys.
        stopped: why the search ended, in words.

    Example:
        >>> record = RunRecord("teacher.safetensors", "student.safetensors", "student.onnx", "faces")
        >>> record.write(Path(".")).name
        'run.json'
    """

    teacher: str
    student: str
    file: str
    images: str
    pairs: str | None = None
    tuning_people: str | None = None
    eval_people: str | None = None
    sensitivity: str | None = None
    log: str | None = None
    trials: tuple[Mapping[str, Any], ...] = ()
    stopped: str | None = None

    def _key_figures(self) -> Mapping[str, object]:
        return {name: getattr(self, name) for name in _REQUIRED}

    def write(self, folder: str | Path) -> Path:
        """Write ``run.json`` and return its path.

        Args:
            folder: run folder; it is made if it is missing.

        Raises:
            ExportError: the file cannot be written.
        """
        make_folder(folder)
        record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        record |= {name: _from(Path(folder), record[name]) for name in _PATHS}
        path = Path(folder) / RUN_FILE
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Read the ``run.json`` of a run folder.

        Args:
            folder: run folder.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        path = as_path(folder) / RUN_FILE
        try:
            return cls(**_checked(read_json(path, "the run record"), path, Path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{folder} has no {RUN_FILE}: pass the run folder of qface compress") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({one_line(error, 200)}): restore it") from error


def _from(folder: Path, text: str | None) -> str | None:
    """Make a path relative if it is inside ``folder``, else absolute; keep a text that is not a path."""
    if text is None or text in _HALVES or not os.path.exists(text):
        return text
    path = Path(os.path.realpath(text))
    root = Path(os.path.realpath(folder))
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _in(folder: Path, text: str | None) -> str | None:
    """Resolve a path relative to ``folder``; keep a text that names nothing there."""
    if text is None or text in _HALVES or not os.path.exists(folder / text):
        return text
    return str(folder / text)


def _checked(record: Any, path: Path, folder: Path) -> dict[str, Any]:
    """Return the fields of a parsed ``run.json`` with paths resolved."""
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} does not have schema_version {SCHEMA_VERSION}: run qface compress again, or update qface"
        )
    known = {field.name: record[field.name] for field in fields(RunRecord) if field.name in record}
    wrong = [
        name for name in _PATHS if not isinstance(known.get(name), str if name in _REQUIRED else (str, type(None)))
    ]
    trials = known.get("trials") or []
    if wrong or not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
        raise ConfigError(f"{path}: {(*wrong, 'trials')[0]} is missing or has the wrong type; restore the file")
    return {**known, **{name: _in(folder, known.get(name)) for name in _PATHS}, "trials": tuple(trials)}
