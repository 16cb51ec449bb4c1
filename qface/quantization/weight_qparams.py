"""Quantization parameters worth trying for the weights of a layer, for each channel.

Integer kernels have no zero point for weights, but a channel's integers may be any (asymmetric weights; Krishnamoorthi,
2018, section 2.1, has the zero point in the kernel instead). :class:`qface.quantization.WeightFakeQuantize` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qface.quantization.fake_quantize import WeightFakeQuantize, offset_range
from qface.quantization.kernels import quantize_strided
from qface.quantization.qparams import SAFE_WEIGHT

__all__ = ["WeightQParams", "candidate_qparams", "takes_offsets"]

_MAX_BITS = 6  # more leave no room for offsets in the 7 bits that are safe on all processors
_HALF_STEP_BITS = 4  # up to here there is room for integers that are twice as large
_FRACTIONS = torch.linspace(0.3, 1.1, 33).tolist()  # candidate scales, relative to one that clips no weight
_CENTERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidate centers, from 0 to the middle of a channel's own range


@dataclass(frozen=True)
class WeightQParams:
    """Parameters of weights, which are ``scale * (stride * q + offset)``.

    Args:
        scale: float32 [C].
        offset: int32 [C].
        stride: 1 or 2.
    """

    scale: Tensor
    offset: Tensor
    stride: int

    def times(self, factor: float) -> WeightQParams:
        """Return the same with all scales multiplied by ``factor``."""
        return replace(self, scale=self.scale * factor)


def takes_offsets(quantizer: WeightFakeQuantize) -> bool:
    """Return True if GPTQ may give the channels of a weight offsets: its observer is ``"mse"``, its bits at most 6."""
    return quantizer.observer == "mse" and quantizer.bits <= _MAX_BITS


def candidate_qparams(quantizer: WeightFakeQuantize, rows: Tensor, importance: Tensor) -> list[WeightQParams]:
    """Return the symmetric parameters that a weight has, and at up to 6 bits others with offsets.

    Weights whose observer is not ``"mse"`` keep the range that was asked for.

    Args:
        quantizer: quantizer of the weight, with a range.
        rows: weight, [C, K].
        importance: weight of each squared error, [C, K].
    """
    scale, offset = quantizer.scale.detach().cpu(), torch.zeros(len(rows), dtype=torch.int32)
    if not takes_offsets(quantizer):
        return [WeightQParams(scale, offset, 1)]
    stride = 2 if quantizer.bits <= _HALF_STEP_BITS else 1
    symmetric = WeightQParams(scale / stride, offset, stride)
    return [symmetric, _with_offsets(quantizer, rows.float(), importance.float(), symmetric)]


def _with_offsets(
    quantizer: WeightFakeQuantize, rows: Tensor, importance: Tensor, symmetric: WeightQParams
) -> WeightQParams:
    """Return the scales and offsets with the smallest weighted squared error; channels of equal weights stay."""
    low, high = rows.aminmax(dim=1)
    stride, (minimum, maximum) = symmetric.stride, offset_range(quantizer.bits, symmetric.stride)
    widest = (high - low) / (stride * (quantizer.quant_max - quantizer.quant_min))
    widest = torch.maximum(widest, torch.maximum(-low, high) / SAFE_WEIGHT).clamp(min=torch.finfo(torch.float32).tiny)
    scale, offset = symmetric.scale.clone(), symmetric.offset.clone()
    best = torch.full_like(widest, torch.inf)
    for fraction in _FRACTIONS:
        for center in _CENTERS:
            steps = fraction * widest
            middle = center * (low + high) / 2 / steps - stride * (quantizer.quant_max + quantizer.quant_min) / 2
            shift = middle.round().clamp(minimum, maximum)
            integers = quantize_strided(
                rows, steps[:, None], shift[:, None], stride, quantizer.quant_min, quantizer.quant_max
            )
            error = (integers.mul_(steps[:, None]).sub_(rows).square_() * importance).sum(1)
            better = (error < best) & (high > low)
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, steps, scale), torch.where(better, shift.int(), offset)
    return WeightQParams(scale, offset, stride)
