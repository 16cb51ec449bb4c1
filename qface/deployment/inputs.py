"""Inputs of a file: normalized floats, or the bytes of an image, which the file then normalizes itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from qface.choices import INPUTS
from qface.deployment import integer_graph as ir
from qface.errors import ConfigError
from qface.preprocessing import Preprocessing

__all__ = [
    "FLOAT_INPUT",
    "INPUTS",
    "UINT8_INPUT",
    "as_model_sees",
    "check_input",
    "through_uint8",
    "to_file_input",
    "with_input_dtype",
]

FLOAT_INPUT, UINT8_INPUT = INPUTS

_BYTES = ir.TensorQParams(8, 1.0, 0)
_ORDERS: dict[str, ir.Channels] = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}


def check_input(kind: str) -> None:
    """Make sure that ``kind`` is one of :data:`INPUTS`.

    Raises:
        ConfigError: it is not.
    """
    if kind not in INPUTS:
        raise ConfigError(f"input {kind!r} is none of {', '.join(INPUTS)}")


def with_input_dtype(kind: str, graph: ir.IntegerGraph) -> ir.IntegerGraph:
    """``graph``, which reads normalized floats, as it is or reading RGB bytes [N, 3, height, width] instead.

    Bytes that are the integers of the quantizer behind the image are taken as they are; else they are normalized first.

    Args:
        kind: one of :data:`INPUTS`.
        graph: what :func:`qface.deployment.lowering.lower` returned.
    """
    return _with_uint8_input(graph) if kind == UINT8_INPUT else graph


def _with_uint8_input(graph: ir.IntegerGraph) -> ir.IntegerGraph:
    pixels = ir.Value(graph.images.name, _BYTES)
    normalize = _normalization(pixels, graph.preprocessing)
    operations = [_reader_of_bytes(operation, graph.images, normalize) for operation in graph.operations]
    if any(normalize.output in operation.inputs for operation in operations):
        operations.insert(0, normalize)
    return replace(graph, images=pixels, operations=tuple(operations))


def _normalization(pixels: ir.Value, preprocessing: Preprocessing) -> ir.NormalizeUint8Op:
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    output = ir.Value("normalized:0")
    return ir.NormalizeUint8Op("normalize", (pixels,), output, _ORDERS[preprocessing.color], mean, std)


def _reader_of_bytes(operation: ir.IntegerOp, images: ir.Value, normalize: ir.NormalizeUint8Op) -> ir.IntegerOp:
    """``operation`` with the bytes, or what they are normalized to, in the place of ``images``."""
    if isinstance(operation, ir.QuantizeImageOp) and _keeps_bytes(operation, normalize):
        return ir.Uint8InputOp(operation.name, normalize.inputs, operation.output, normalize.channels)
    inputs = tuple(normalize.output if value == images else value for value in operation.inputs)
    return replace(operation, inputs=inputs)


def _keeps_bytes(quantize: ir.QuantizeImageOp, normalize: ir.NormalizeUint8Op) -> bool:
    """True if every byte, normalized and quantized, becomes the integer that it was."""
    qparams = quantize.output.qparams
    assert qparams is not None
    pixels = np.arange(256, dtype=np.float32)[:, None]
    shifted = (pixels - normalize.mean) / normalize.std - np.float32(quantize.offset)
    integers = np.rint(shifted / np.float32(qparams.scale)) + qparams.zero_point
    return bool((integers == pixels).all())


def as_model_sees(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """Normalized ``images`` [N, 3, height, width] as the network of ``graph`` sees them: rounded where it reads bytes.

    Only images that were resized are not bytes already.
    """
    return images if graph.images.qparams is None else through_uint8(images, graph.preprocessing)


def through_uint8(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalized ``images`` [N, 3, height, width] as they are after a way through bytes."""
    return preprocessing.normalize(preprocessing.to_bytes(images))


def to_file_input(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """Normalized ``images`` [N, 3, height, width] in the form that the file of ``graph`` reads."""
    return images if graph.images.qparams is None else graph.preprocessing.to_bytes(images)
