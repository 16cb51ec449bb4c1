"""Bit-exact emulation of onnxruntime's integer kernels, with integers held in float tensors.

A student in eval mode computes with these. "Equal up to float noise" is not enough: 1e-7 of noise makes some value
round the other way, and in a low-bit network that changes many values of the next layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["accumulate", "choose_positive", "in_memory_order", "quantize_affine", "quantize_strided", "requantize"]

# float32 represents all integers up to here exactly.
_EXACT_FLOAT32 = 2**24


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize ``x`` as ONNX QuantizeLinear does: divide, round half to even, add the zero point, clamp.

    Args:
        x: float tensor.
        scale: broadcasts against ``x``.
        zero_point: broadcasts against ``x``.
        quant_min: minimum integer.
        quant_max: maximum integer.

    Returns:
        The integers as floats, zero point included.
    """
    return (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)


def quantize_strided(x: Tensor, scale: Tensor, offset: Tensor, stride: int, quant_min: int, quant_max: int) -> Tensor:
    """Quantize ``x`` to the integers ``stride * q + offset``: the nearest q, clamped.

    Args:
        x: float tensor.
        scale: broadcasts against ``x``.
        offset: broadcasts against ``x``.
        stride: distance of two integers.
        quant_min: minimum q.
        quant_max: maximum q.

    Returns:
        The integers as floats.
    """
    codes = (x / scale).sub_(offset).div_(stride).round_()
    return codes.clamp_(quant_min, quant_max).mul_(stride).add_(offset)


def accumulate(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``multiply(x, weight) + bias`` on integers exactly, then round it to float32.

    Args:
        multiply: a convolution or matrix product.
        x: integers minus the zero point, [N, ...].
        weight: integers [out_channels, ...].
        bias: integers that broadcast against the result, or None.
    """
    low, high = in_memory_order(x, like=x).aminmax()
    bound = weight.abs().reshape(len(weight), -1).sum(1).max() * torch.maximum(-low, high)
    if bias is not None:
        bound = bound + bias.abs().max()
    dtype = torch.float32 if bound < _EXACT_FLOAT32 else torch.float64
    sums = multiply(x.to(dtype), weight.to(dtype))
    return (sums if bias is None else sums.add_(bias.to(dtype))).float()


def choose_positive(x: Tensor, positive: Tensor, other: Tensor) -> Tensor:
    """Return ``positive`` where ``x`` is above 0 and ``other`` elsewhere, both finite; overwrite ``other``.

    Takes a third of the time of ``torch.where``.
    """
    return other.sub_(_where_positive(x, other)).add_(_where_positive(x, positive))


def _where_positive(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` where ``x`` is above 0, else 0."""
    found: Tensor = torch.ops.aten.threshold_backward(values, x, 0.0)
    return found


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` with the dimensions in the order in which ``like`` lies in memory; reductions copy others first."""
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1) if channels_last else x


def requantize(
    sums: Tensor, input_scale: Tensor, weight_scale: Tensor, output_scale: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Requantize accumulator values in place; round half to even, without zero point or clamp.

    Args:
        sums: accumulator integers as float32; overwritten.
        input_scale: scale of the input; all scales broadcast against ``sums``.
        weight_scale: scale of the weight.
        output_scale: scale of the output.
        shift: what the sums contain for zero points per channel, in steps of the output; it is subtracted again.
    """
    integers = sums.mul_(input_scale * weight_scale / output_scale).round_()
    return integers if shift is None else integers.sub_(shift)
