"""Read and write a :class:`QuantizationConfig` as a JSON file, such as the result of :func:`qface.allocate_bits`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from qface.errors import ConfigError, one_line
from qface.files import as_path, check_folder, replacing
from qface.limits import MALFORMED, read_json
from qface.quantization.quantization_config import LayerBits, QuantizationConfig

__all__ = ["load_bits", "save_bits"]

_SCHEMA_VERSION = 1


def save_bits(config: QuantizationConfig, path: str | Path) -> None:
    """Write a quantization config to a JSON file.

    Args:
        config: the config, such as the result of :func:`qface.allocate_bits`.
        path: file to write (``.json``).

    Raises:
        ExportError: the file cannot be written.

    Example:
        >>> qface.save_bits(qface.QuantizationConfig(4, 8), "bits.json")
    """
    check_folder(path)
    record = {"schema_version": _SCHEMA_VERSION, **config.to_dict()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_bits(path: str | Path) -> QuantizationConfig:
    """Read a quantization config from a JSON file.

    Args:
        path: file that :func:`save_bits` wrote. Missing fields take their defaults; unknown fields are refused.

    Returns:
        The config, for :func:`qface.quantize`.

    Raises:
        ConfigError: the file is missing, damaged, or has a field that is unknown or out of range.
        LimitError: the file exceeds :mod:`qface.limits`.

    Example:
        >>> qface.save_bits(qface.QuantizationConfig(4, 8), "bits.json")
        >>> student = qface.quantize(teacher, qface.load_bits("bits.json"))
    """
    path = as_path(path)
    try:
        return _config(read_json(path, "the quantization config"))
    except (OSError, ConfigError, *MALFORMED) as error:
        raise ConfigError(
            f"cannot read bits from {path} ({one_line(error, 200)}): give a file of qface allocate-bits"
        ) from error


def _config(record: Any) -> QuantizationConfig:
    if not isinstance(record, dict) or record.pop("schema_version", None) != _SCHEMA_VERSION:
        raise ConfigError(f"it is not a JSON object with schema_version {_SCHEMA_VERSION}")
    unknown = sorted(record.keys() - {field.name for field in fields(QuantizationConfig)})
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r}")
    if not isinstance(record.get("wide_residuals", True), bool):
        raise ConfigError("wide_residuals must be true or false")
    ignored = record.get("ignored_layers", [])
    if not isinstance(ignored, list) or not all(isinstance(pattern, str) for pattern in ignored):
        raise ConfigError("ignored_layers must be a list of strings")
    overrides = record.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ConfigError("overrides must be an object with the bits of each layer")
    return QuantizationConfig(**{**record, "overrides": {name: LayerBits(**bits) for name, bits in overrides.items()}})
