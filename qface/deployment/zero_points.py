"""Zero points per channel in integer kernels, which have one per tensor: biases absorb the differences.

A tensor with ``shifts`` stores ``q + shift[c]`` in channel c, with q the integer of the tensor's zero point. The layer
before it adds the shifts to its bias, and the layer after it subtracts what its weights make of them, exactly. Zeros
around the tensor differ by channel too, so a convolution's padding becomes a node of its own.

:mod:`qface.quantization.quantized_layers` rounds the same biases, so that a student computes the integers of its file.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from qface.deployment.integer_graph import AffineOp, ConvolutionOp, Int32, LinearOp, PReluOp, TensorQParams
from qface.quantization.quantized_layers import MAX_BIAS

__all__ = ["bias_of", "channel_zero_points", "slope_bias_of"]


def bias_of(operation: ConvolutionOp | LinearOp | AffineOp) -> Int32 | None:
    """Return the bias of an operation's kernel with the shifts of its input and output, [out]; None for no bias."""
    before, after = operation.inputs[0].qparams, operation.output.qparams
    assert before is not None
    parts = [] if operation.bias is None else [operation.bias]
    if after is not None and after.shifts:
        ratio = np.float32(after.scale) / (np.float32(before.scale) * operation.weight.scale)
        moved = np.rint(_shifts(after).astype(np.float32) * ratio)
        parts.append(moved.clip(-MAX_BIAS, MAX_BIAS).astype(np.int32))
    if before.shifts and isinstance(operation, ConvolutionOp):
        parts.append(-_products_with(operation, _shifts(before)))
    return sum(parts[1:], parts[0]) if parts else None


def slope_bias_of(operation: PReluOp) -> Int32 | None:
    """Return the bias of the product with a PReLU's slopes, [channels]; None if its zero point is that of the tensor.

    Input and output share their scale and zero points. In units of input scale x slope scale.
    """
    after = operation.output.qparams
    assert after is not None
    if not after.shifts:
        return None
    shifts = _shifts(after)
    wanted = np.rint(shifts.astype(np.float32) / np.float32(operation.slope_scale)).astype(np.int32)
    return cast(Int32, wanted - operation.slopes.astype(np.int32) * shifts)


def channel_zero_points(qparams: TensorQParams) -> Int32:
    """Return the zero point of each channel, [channels]; [1] if the channels share it."""
    return np.int32(qparams.zero_point) + (_shifts(qparams) if qparams.shifts else np.zeros(1, np.int32))


def _products_with(operation: ConvolutionOp, shifts: Int32) -> Int32:
    """Return what a convolution makes of an input that is ``shifts`` [in] everywhere, [out]."""
    weight = operation.weight.integers.sum((2, 3), dtype=np.int32)  # [out, in / groups]
    products = weight.reshape(operation.groups, -1, weight.shape[1]) * shifts.reshape(operation.groups, 1, -1)
    return cast(Int32, products.sum(2, dtype=np.int32).reshape(-1))


def _shifts(qparams: TensorQParams) -> Int32:
    return np.array(qparams.shifts, np.int32)
