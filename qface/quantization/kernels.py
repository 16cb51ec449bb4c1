"""The arithmetic of onnxruntime's integer kernels, bit for bit, on integers held in float tensors.

A student in eval mode computes with these. A low-bit network is chaotic: one value that rounds the other way changes
many of the next layer, and 1e-7 of float noise is enough for that. So "the same up to float noise" does not do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["accumulate", "quantize_affine", "requantize"]

# float32 holds every integer below.
_EXACT_FLOAT32 = 2**24


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The integers of ``x`` as floats, zero point included; divides and rounds half to even, as QuantizeLinear does."""
    return (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)


def accumulate(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``multiply(x, weight) + bias`` of integer tensors, exact, then rounded to float32 as a kernel rounds its int32.

    Args:
        multiply: a convolution or matrix product that only sums products.
        x: integers without their zero point, [N, ...].
        weight: integers [out_channels, ...].
        bias: integers that broadcast against the result.
    """
    low, high = x.aminmax()
    bound = weight.abs().reshape(len(weight), -1).sum(1).max() * torch.maximum(-low, high)
    if bias is not None:
        bound = bound + bias.abs().max()
    dtype = torch.float32 if bound < _EXACT_FLOAT32 else torch.float64
    sums = multiply(x.to(dtype), weight.to(dtype))
    return (sums if bias is None else sums.add_(bias.to(dtype))).float()


def requantize(sums: Tensor, input_scale: Tensor, weight_scale: Tensor, output_scale: Tensor) -> Tensor:
    """``sums``, overwritten, in steps of ``output_scale``, rounded half to even; the scales broadcast against them."""
    return sums.mul_(input_scale * weight_scale / output_scale).round_()
