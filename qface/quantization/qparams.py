"""The integers of a quantized tensor, and the scale and zero point by which they stand for floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["QUINT8_MAX", "IntegerRange", "QParams"]

QUINT8_MAX = 255
"""Greatest integer of an activation, which is a byte whatever its bits."""


class QParams(NamedTuple):
    """Quantization parameters: the integer ``q`` stands for ``scale * (q - zero_point)``.

    Args:
        scale: float32, [1], or one value per output channel of a weight.
        zero_point: int32, of the same shape.
        quant_min: least integer.
        quant_max: greatest integer.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int


@dataclass(frozen=True)
class IntegerRange:
    """The integers of a quantized tensor, before it has a scale.

    Args:
        bits: 2 to 8.
        symmetric: signed with zero point 0 (weights), or unsigned with a zero point (activations).
    """

    bits: int
    symmetric: bool

    @property
    def quant_min(self) -> int:
        """Least integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else QUINT8_MAX + 1 - (1 << self.bits)

    @property
    def quant_max(self) -> int:
        """Greatest integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else QUINT8_MAX

    @property
    def num_steps(self) -> int:
        """Steps from zero to the greatest weight, or from the least to the greatest activation."""
        return self.quant_max if self.symmetric else self.quant_max - self.quant_min

    def choose_qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (float32 and int32, like ``low``) that cover ``low`` .. ``high`` and hold zero exactly.

        A range of nothing but zeros gets the scale 1.
        """
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.num_steps
        else:
            scale = (high - low) / self.num_steps
        # float32 has no smaller normal number, and a division by zero would spread NaN.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        if self.symmetric:
            return scale.float(), torch.zeros_like(scale).int()
        zero_point = self.quant_min + (-low / scale).round().clamp(0, self.num_steps)
        return scale.float(), zero_point.int()

    def fake_quantize(self, rows: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``rows`` quantized and dequantized; scale and zero point broadcast against it."""
        integers = (rows / scale).round_().add_(zero_point).clamp_(self.quant_min, self.quant_max)
        return integers.sub_(zero_point).mul_(scale)
