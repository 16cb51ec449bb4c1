"""What a file reads: normalised floats, or the bytes of the image, which whoever runs it then need not normalise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from qface.deployment import graph as ir
from qface.errors import ConfigError
from qface.preprocessing import Preprocessing

__all__ = ["FLOAT_INPUT", "INPUTS", "UINT8_INPUT", "check_input", "fed", "reading", "rounded", "seen"]

FLOAT_INPUT = "float32"
UINT8_INPUT = "uint8"
INPUTS = (FLOAT_INPUT, UINT8_INPUT)

_BYTES = ir.Grid(8, 1.0, 0)
_ORDERS: dict[str, ir.Channels] = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}


def check_input(kind: str) -> None:
    """Make sure that ``kind`` is one of :data:`INPUTS`.

    Raises:
        ConfigError: it is not.
    """
    if kind not in INPUTS:
        raise ConfigError(f"input {kind!r} is none of {', '.join(INPUTS)}")


def reading(kind: str, graph: ir.IntegerGraph) -> ir.IntegerGraph:
    """``graph``, which reads normalised floats, as it is or reading RGB bytes [N, 3, height, width] instead.

    Bytes that lie on the grid of the quantizer behind the image are taken as they are; else they are normalised first.

    Args:
        kind: one of :data:`INPUTS`.
        graph: what :func:`qface.deployment.lowering.lower` returned.
    """
    return _reading_bytes(graph) if kind == UINT8_INPUT else graph


def _reading_bytes(graph: ir.IntegerGraph) -> ir.IntegerGraph:
    pixels = ir.Value(graph.images.name, _BYTES)
    normalise = _normalisation(pixels, graph.preprocessing)
    operations = [_reader_of_bytes(operation, graph.images, normalise) for operation in graph.operations]
    if any(normalise.output in operation.inputs for operation in operations):
        operations.insert(0, normalise)
    return replace(graph, images=pixels, operations=tuple(operations))


def _normalisation(pixels: ir.Value, preprocessing: Preprocessing) -> ir.NormaliseBytes:
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    output = ir.Value("normalised:0")
    return ir.NormaliseBytes("normalise", (pixels,), output, _ORDERS[preprocessing.color], mean, std)


def _reader_of_bytes(operation: ir.Operation, images: ir.Value, normalise: ir.NormaliseBytes) -> ir.Operation:
    """``operation`` with the bytes, or what they are normalised to, in the place of ``images``."""
    if isinstance(operation, ir.QuantizeImage) and _keeps_bytes(operation, normalise):
        return ir.TakeBytes(operation.name, normalise.inputs, operation.output, normalise.channels)
    inputs = tuple(normalise.output if value == images else value for value in operation.inputs)
    return replace(operation, inputs=inputs)


def _keeps_bytes(quantize: ir.QuantizeImage, normalise: ir.NormaliseBytes) -> bool:
    """Whether every byte, normalised and quantized, becomes the integer that it was."""
    grid = quantize.output.grid
    assert grid is not None
    pixels = np.arange(256, dtype=np.float32)[:, None]
    shifted = (pixels - normalise.mean) / normalise.std - np.float32(quantize.offset)
    integers = np.rint(shifted / np.float32(grid.scale)) + grid.zero_point
    return bool((integers == pixels).all())


def seen(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """What the network of ``graph`` sees of normalised ``images`` [N, 3, height, width]: rounded where it reads bytes.

    Only images that were resized are not bytes already.
    """
    return images if graph.images.grid is None else rounded(images, graph.preprocessing)


def rounded(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised ``images`` [N, 3, height, width] as they are after a way through bytes."""
    return preprocessing.normalise(preprocessing.to_bytes(images))


def fed(graph: ir.IntegerGraph, images: Tensor) -> Tensor:
    """Normalised ``images`` [N, 3, height, width] in the form that the file of ``graph`` reads."""
    return images if graph.images.grid is None else graph.preprocessing.to_bytes(images)
