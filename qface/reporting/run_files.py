"""Files of a run that figures are made from: its training log, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qface import limits
from qface.compression.run_record import RunRecord
from qface.errors import ConfigError, one_line
from qface.limits import named, parse_json

__all__ = ["read_json", "read_training", "training_log"]


def training_log(source: Path) -> Path:
    """Return the training log in the run folder ``source``, or ``source`` if it is a file.

    Args:
        source: ``log.jsonl``, or the run folder of a distillation or a compression.

    Raises:
        ConfigError: the folder is no run folder, or its run did not train.
    """
    if not source.is_dir():
        return source
    own = source / "log.jsonl"
    if own.exists():
        return own
    log = RunRecord.read(source).log
    if log is None:
        raise ConfigError(f"{source} has no training log: pass the folder of a run with distillation")
    return Path(log)


def read_training(path: str | Path) -> tuple[Mapping[str, float], ...]:
    """Read ``log.jsonl`` of a distillation: one mapping of numbers per step.

    Raises:
        ConfigError: the file cannot be read, or is not such a log.
    """
    with _telling_damage(path), named(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = parse_json(f"[{','.join(lines)}]", "its JSON")
    if not all(_is_step(row) for row in rows):
        raise ConfigError(f"{path} is not a log of a distillation: pass log.jsonl of a run folder")
    return tuple(rows)


def _is_step(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and {"step", "loss"} <= row.keys()
        and all(isinstance(value, (int, float)) for value in row.values())
    )


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: the file cannot be read.
    """
    with _telling_damage(path):
        return limits.read_json(Path(path), "its JSON")


@contextmanager
def _telling_damage(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({one_line(error, 200)}): restore it") from error
