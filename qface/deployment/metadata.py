"""Access to the metadata of ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from qface.files import replacing
from qface.models.onnx_import.onnx_file import read_proto

__all__ = ["EMBEDDING", "UNIT_LENGTH", "add_metadata", "read_metadata"]

EMBEDDING = "embedding"
"""Metadata key for the norm of embeddings; absent if the file does not normalize them."""
UNIT_LENGTH = "unit length"


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of an ONNX file.

    Args:
        path: path of the file.

    Returns:
        Text by key; empty if the file has no metadata.

    Raises:
        CheckpointError: the file is missing or damaged.

    Example:
        >>> read_metadata("student.onnx")["input"]
        'float32'
    """
    return {entry.key: entry.value for entry in read_proto(path).metadata_props}


def add_metadata(path: str | Path, entries: Mapping[str, str]) -> None:
    """Add ``entries`` to the metadata of an ONNX file; other keys and the graph stay unchanged.

    Args:
        path: path of the file, which is replaced atomically.
        entries: text by key; existing keys are overwritten.

    Raises:
        CheckpointError: the file is missing or damaged.
        ExportError: the file cannot be replaced.

    Example:
        >>> add_metadata("student.onnx", {"device": "door 3"})
    """
    model = read_proto(path)
    present = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**present, **entries})
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
