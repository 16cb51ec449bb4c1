"""Reading and adding metadata of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from qface.files import replacing
from qface.models.onnx_import.onnx_file import read_proto

__all__ = ["EMBEDDING", "UNIT_LENGTH", "add_metadata", "read_metadata"]

EMBEDDING = "embedding"
"""The key for the length of embeddings; a file without it has them as the network makes them."""
UNIT_LENGTH = "unit length"


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of the ONNX file at ``path``.

    Args:
        path: the file.

    Returns:
        Texts by key; empty where the file has none.

    Raises:
        CheckpointError: the file is missing or damaged.

    Example:
        >>> read_metadata("student.onnx")["input"]
        'float32'
    """
    return {entry.key: entry.value for entry in read_proto(path).metadata_props}


def add_metadata(path: str | Path, entries: Mapping[str, str]) -> None:
    """Write ``entries`` into the metadata of the ONNX file at ``path``; other keys and the graph stay as they are.

    Args:
        path: the file; it is replaced as a whole or not at all.
        entries: texts by key; a key that the file has already gets the new text.

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
