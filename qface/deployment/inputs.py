"""Input types of an exported file: normalized float32, or RGB bytes that the file normalizes itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from qface.choices import InputType
from qface.deployment import integer_graph as ir
from qface.preprocessing import Preprocessing

__all__ = [
    "FLOAT_INPUT",
    "UINT8_INPUT",
    "as_model_sees",
    "through_uint8",
    "to_file_input",
    "with_input_dtype",
]

FLOAT_INPUT: InputType = "float32"
UINT8_INPUT: InputType = "uint8"

_BYTES = ir.TensorQParams(8, 1.0, 0)
_ORDERS: dict[str, ir.Channels] = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}


def with_input_dtype(kind: str, graph: ir.IntegerGraph) -> ir.IntegerGraph:
    """Return ``graph`` with its float input, or with RGB bytes [N, 3, height, width] as input instead.

    Bytes go in directly if they equal the integers of the input quantizer; otherwise they are normalized first.

    Args:
        kind: an :data:`qface.choices.InputType`.
        graph: output of :func:`qface.deployment.lowering.lower`, with a float input.
    """
    return _with_uint8_input(graph) if kind == UINT8_INPUT else graph


def _with_uint8_input(graph: ir.IntegerGraph) -> ir.IntegerGraph:
    pixels = ir.Value(graph.images.name, _BYTES)
    normalize = _normalization(pixels, graph.preprocessing)
    operations = [_with_uint8(operation, graph.images, normalize) for operation in graph.operations]
    if any(normalize.output in operation.inputs for operation in operations):
        operations.insert(0, normalize)
    return replace(graph, images=pixels, operations=tuple(operations))


def _normalization(pixels: ir.Value, preprocessing: Preprocessing) -> ir.NormalizeUint8Op:
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    output = ir.Value("normalized:0")
    return ir.NormalizeUint8Op("normalize", (pixels,), output, _ORDERS[preprocessing.color], mean, std)


def _with_uint8(operation: ir.IntegerOp, images: ir.Value, normalize: ir.NormalizeUint8Op) -> ir.IntegerOp:
    """Replace the input ``images`` of ``operation`` by the bytes, or by their normalized values."""
    if isinstance(operation, ir.QuantizeImageOp) and _keeps_bytes(operation, normalize):
        return ir.Uint8InputOp(operation.name, normalize.inputs, operation.output, normalize.channels)
    inputs = tuple(normalize.output if value == images else value for value in operation.inputs)
    return replace(operation, inputs=inputs)


def _keeps_bytes(quantize: ir.QuantizeImageOp, normalize: ir.NormalizeUint8Op) -> bool:
    """True if normalization and quantization map every byte to itself."""
    qparams = quantize.output.qparams
    assert qparams is not None
    pixels = np.arange(256, dtype=np.float32)[:, None]
    shifted = (pixels - normalize.mean) / normalize.std - np.float32(quantize.offset)
    integers = np.rint(shifted / np.float32(qparams.scale)) + qparams.zero_point
    return bool((integers == pixels).all())


def as_model_sees(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """Round normalized ``images`` to integer gray levels if the input of ``graph`` is uint8.

    This changes only images that were resized.

    Args:
        graph: integer graph.
        images: float32 [N, 3, height, width], normalized.
    """
    return images if graph.images.qparams is None else through_uint8(images, graph.preprocessing)


def through_uint8(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Round normalized ``images`` [N, 3, height, width] to uint8 pixels and normalize them again."""
    return preprocessing.normalize(preprocessing.to_bytes(images))


def to_file_input(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """Convert normalized ``images`` [N, 3, height, width] to the input type of the file of ``graph``."""
    return images if graph.images.qparams is None else graph.preprocessing.to_bytes(images)
