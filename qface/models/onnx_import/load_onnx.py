"""Read a file, import its graph, and hold the network against onnxruntime."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from qface.errors import CheckpointError, one_line
from qface.models.onnx_import.graph_import import GraphImport
from qface.models.onnx_import.operators import OPERATORS
from qface.preprocessing import Preprocessing, written_preprocessing
from qface.provenance import with_provenance, written_provenance

__all__ = ["load_onnx"]

_TOLERANCE = 1e-3
"""Greatest difference to onnxruntime, in parts of the embedding's length; the order of sums makes a hundredth of it."""


def load_onnx(path: str | Path) -> tuple[nn.Module, Preprocessing]:
    """The network in an ONNX file, in eval mode, and what it reads: as a file of ours says, or as the graph shows.

    A file of ours also says which steps made the network.

    A subtraction and a scaling of the input at the start of the graph, as older InsightFace files have them, become
    part of the preprocessing.

    Raises:
        CheckpointError: the file is missing or damaged, or the network computes something else than the file.
        UnsupportedLayerError: the graph holds an operation that has no counterpart here; it is named.
    """
    path = Path(path)
    model = _read(path)
    found = GraphImport(model, path, OPERATORS)
    network, likely = found.network()
    written = {entry.key: entry.value for entry in model.metadata_props}
    preprocessing = written_preprocessing(written["preprocessing"], path) if "preprocessing" in written else likely
    with_provenance(network, written_provenance(written.get("provenance", "[]"), path))
    network.eval()
    _check(network, preprocessing, path, reads_bytes=found.normalizes)
    return network, preprocessing


def _read(path: Path) -> onnx.ModelProto:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own errors, which differ between its versions
        raise CheckpointError(f"{path} is no complete ONNX file ({one_line(error, 200)}); fetch it again") from error


def _check(network: nn.Module, preprocessing: Preprocessing, path: Path, reads_bytes: bool) -> None:
    """Compare with onnxruntime on random images.

    Raises:
        CheckpointError: the two differ.
    """
    onnxruntime: Any = import_module("onnxruntime")  # it has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    pixels = torch.randint(0, 256, (1, 3, *preprocessing.size), generator=torch.Generator().manual_seed(0)).float()
    mean, std = preprocessing.mean[0], preprocessing.std[0]
    normalized = (pixels - mean) / std
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = pixels if reads_bytes else normalized
        (expected,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    except Exception as error:  # onnxruntime's errors have no common base
        raise CheckpointError(f"onnxruntime cannot run {path}: {one_line(error, 200)}") from error
    try:
        with torch.no_grad():
            found = network(normalized)
    except RuntimeError as error:  # torch's own
        raise CheckpointError(
            f"{path} was not understood: torch cannot run it ({one_line(error, 200)}); please report its graph"
        ) from error
    difference = float((found - torch.from_numpy(expected)).abs().max()) if found.shape == expected.shape else np.inf
    if not difference <= _TOLERANCE * float(np.linalg.norm(expected)):
        raise CheckpointError(
            f"{path} was not understood: torch makes {list(found.shape)} of an image and onnxruntime "
            f"{list(expected.shape)}, {difference:.3g} apart; please report its graph"
        )
