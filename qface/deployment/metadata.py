"""Reading and adding metadata of an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx

from qface.errors import CheckpointError, one_line
from qface.files import replacing

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
        >>> read_metadata("student.onnx")["input"]  # doctest: +SKIP
        'uint8'
    """
    return {entry.key: entry.value for entry in _load(path).metadata_props}


def add_metadata(path: str | Path, entries: Mapping[str, str]) -> None:
    """Write ``entries`` into the metadata of the ONNX file at ``path``; other keys and the graph stay as they are.

    Args:
        path: the file; it is replaced as a whole or not at all.
        entries: texts by key; a key that the file has already gets the new text.

    Raises:
        CheckpointError: the file is missing or damaged.
        ExportError: the file cannot be replaced.

    Example:
        >>> add_metadata("student.onnx", {"device": "door 3"})  # doctest: +SKIP
    """
    model = _load(path)
    present = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**present, **entries})
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _load(path: str | Path) -> onnx.ModelProto:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        # Weights in files of their own stay there.
        model: onnx.ModelProto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors, which differ between its versions
        raise CheckpointError(f"{path} is no complete ONNX file ({one_line(error, 200)}); fetch it again") from error
    return model
