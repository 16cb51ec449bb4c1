"""``run.json``: the files that one compression read and wrote, so that a report finds them in its run folder."""

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
from qface.limits import named, parse_json
from qface.results import Result

__all__ = ["RUN_FILE", "RunRecord"]

RUN_FILE = "run.json"
SCHEMA_VERSION = 1

_REQUIRED = ("teacher", "student", "file", "images")
_PATHS = (*_REQUIRED, "pairs", "tuning_people", "eval_people", "sensitivity", "log")
_HALVES = (FIRST_HALF, SECOND_HALF)


@dataclass(frozen=True, repr=False)
class RunRecord(Result):
    """The inputs and results of one compression. Paths are absolute in memory, and relative in a folder's ``run.json``.

    Args:
        teacher: the float network: a file, a name, or ``package.module:factory``.
        student: the quantized network (``.safetensors``).
        file: the exported file (``.onnx``).
        images: the folder of face crops.
        pairs: a list of pairs.
        tuning_people: people that the student was tuned on, as ``--people`` takes them; None for all.
        eval_people: people to evaluate on, likewise.
        sensitivity: JSON of :meth:`qface.Sensitivity.to_dict`.
        log: ``log.jsonl`` of the distillation.
        trials: what was tried, a row each, with the same keys.
        stopped: why the search ended, in a sentence.

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
        """Write ``run.json`` into ``folder``, which is made where it is missing; return its path.

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
        """Read the ``run.json`` of ``folder``.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        path = as_path(folder) / RUN_FILE
        try:
            with named(path):
                record = parse_json(path.read_text(encoding="utf-8"), "the record of the run")
            return cls(**_checked(record, path, Path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{folder} holds no {RUN_FILE}: pass the run folder of qface compress") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({one_line(error, 200)}): restore it") from error


def _from(folder: Path, text: str | None) -> str | None:
    """``text`` as it is written in ``folder``: relative if it names something in there, absolute if elsewhere."""
    if text is None or text in _HALVES or not os.path.exists(text):
        return text
    path = Path(os.path.realpath(text))
    root = Path(os.path.realpath(folder))
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _in(folder: Path, text: str | None) -> str | None:
    """The path that ``text`` names in ``folder``; a name, a selection or a path elsewhere stays as it is."""
    if text is None or text in _HALVES or not os.path.exists(folder / text):
        return text
    return str(folder / text)


def _checked(record: Any, path: Path, folder: Path) -> dict[str, Any]:
    """The fields of ``record``, with their paths resolved."""
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"{path} is no record of schema_version {SCHEMA_VERSION}: compress again, or update qface")
    known = {field.name: record[field.name] for field in fields(RunRecord) if field.name in record}
    wrong = [
        name for name in _PATHS if not isinstance(known.get(name), str if name in _REQUIRED else (str, type(None)))
    ]
    trials = known.get("trials") or []
    if wrong or not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
        raise ConfigError(f"{path}: {(*wrong, 'trials')[0]} is missing or of another type; restore the file")
    return {**known, **{name: _in(folder, known.get(name)) for name in _PATHS}, "trials": tuple(trials)}
