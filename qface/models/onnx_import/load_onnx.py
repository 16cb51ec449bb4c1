"""Load an ONNX file as a network and compare it with onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qface.data.synthetic import synthetic_crops
from qface.errors import CheckpointError, one_line
from qface.models.onnx_import.image_input import ImageInput, find_image_input
from qface.models.onnx_import.importer import Importer
from qface.models.onnx_import.onnx_file import OnnxFile, read_onnx, telling_damage
from qface.models.onnx_import.operators import OPERATOR_RULES
from qface.network_output import as_rows
from qface.onnxruntime_import import import_onnxruntime
from qface.preprocessing import Preprocessing, PreprocessingOverride
from qface.provenance import with_provenance, written_provenance

__all__ = ["load_onnx"]

_TOLERANCE = 1e-3
"""Maximum difference to onnxruntime relative to the embedding norm; another order of summation causes 1e-5."""


def load_onnx(path: str | Path, override: PreprocessingOverride | None = None) -> tuple[nn.Module, Preprocessing]:
    """Load the network in an ONNX file in eval mode, and its Preprocessing.

    Normalization at the start of the graph becomes part of the Preprocessing. The provenance of files that qface
    exported is attached to the network.

    Args:
        path: the file.
        override: the Preprocessing of the graph's input, or some of its fields; replaces the detected one.

    Returns:
        The network from images [N, 3, H, W] to embeddings [N, D], and its Preprocessing.

    Raises:
        LimitError: the file asks for more memory or operators than :mod:`qface.limits` allows.
        CheckpointError: the file is missing or damaged, or the network's embeddings differ from onnxruntime's.
        UnsupportedLayerError: an operator cannot be imported; the message names its node.
    """
    file = read_onnx(path)
    with telling_damage(file.path):
        image = find_image_input(file, override)
    network = Importer(file, image, OPERATOR_RULES).network()
    with_provenance(network, written_provenance(file.metadata.get("provenance", "[]"), file.path))
    _check(network, file, image)
    return network, image.preprocessing


def _check(network: nn.Module, file: OnnxFile, image: ImageInput) -> None:
    """Compare the network's embeddings of synthetic faces with onnxruntime's.

    Raises:
        CheckpointError: they differ.
    """
    declared = file.image.type.tensor_type.shape.dim[0].dim_value
    for count in (declared,) if declared else (1, 2):
        images = image.preprocessing(synthetic_crops(count))
        images = images if image.dtype != torch.uint8 else _rounded(images, image.preprocessing)
        _compare(_from_torch(network, images, file), _from_onnxruntime(file, image, images), file)


def _rounded(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    return preprocessing.normalize(preprocessing.to_bytes(images))


def _from_torch(network: nn.Module, images: Tensor, file: OnnxFile) -> Tensor:
    try:
        with torch.no_grad():
            embeddings: Tensor = network(images)
    except Exception as error:  # torch may raise anything
        raise CheckpointError(
            f"{file.path} was not imported correctly: torch cannot run the network ({one_line(error, 200)}); please "
            "report this with the file"
        ) from error
    return embeddings


def _from_onnxruntime(file: OnnxFile, image: ImageInput, images: Tensor) -> Tensor:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = file.model.SerializeToString() if file.is_converted else str(file.path)
    given = image.to_graph(images)
    given = given.float() if file.is_converted and given.is_floating_point() else given
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (expected,) = session.run([file.output], {file.image.name: given.contiguous().numpy()})
    except Exception as error:  # onnxruntime's errors have no common base
        raise CheckpointError(f"onnxruntime cannot run {file.path}: {one_line(error, 200)}; export it again") from error
    return as_rows(torch.from_numpy(expected))


def _compare(found: Tensor, expected: Tensor, file: OnnxFile) -> None:
    if len(found) == 1 and expected.shape == found.shape[1:]:
        expected = expected[None]  # a Squeeze without axes also drops a batch of 1
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else np.inf
    if not difference <= _TOLERANCE * float(expected.norm(dim=-1).max()):
        raise CheckpointError(
            f"{file.path} was not imported correctly: torch returns embeddings {list(found.shape)} and onnxruntime "
            f"{list(expected.shape)}, with a difference of {difference:.3g}; please report this with the file"
        )
