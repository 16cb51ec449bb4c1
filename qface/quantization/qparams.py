"""Quantization parameters: scale, zero point and integer range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qface.quantization.quantization_config import check_bits

__all__ = ["QUINT8_MAX", "SAFE_WEIGHT", "IntegerRange", "QParams", "shifts"]

QUINT8_MAX = 255
"""Maximum integer of an activation, which is stored as uint8 whatever its bits."""
SAFE_WEIGHT = 64
"""Maximum magnitude of a weight of fewer than 8 bits: two products with a uint8 then fit into int16, in which
processors without VNNI add them."""


class QParams(NamedTuple):
    """Quantization parameters: an integer ``q`` represents the float ``scale * (q - zero_point)``.

    Args:
        scale: float32 [1], or [C] with one value per output channel of a weight.
        zero_point: int32, same shape as the scale, or [C] with one value per channel of an activation.
        quant_min: minimum integer.
        quant_max: maximum integer.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int


def shifts(zero_point: Tensor) -> Tensor:
    """Return by how much the zero point of each channel exceeds the one that the tensor has in an exported file.

    That one is the median; integer kernels have a single zero point per tensor.

    Args:
        zero_point: int32 [C] or [1].
    """
    return zero_point - zero_point.median()


@dataclass(frozen=True)
class IntegerRange:
    """Integer range of a quantized tensor.

    Args:
        bits: 2 to 8.
        symmetric: True for signed integers with zero point 0 (weights), False for uint8 with a zero point
            (activations), which use the top ``2**bits`` integers of the byte.

    Raises:
        ConfigError: ``bits`` is not an integer from 2 to 8.
    """

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)

    @property
    def quant_min(self) -> int:
        """Minimum integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else QUINT8_MAX + 1 - (1 << self.bits)

    @property
    def quant_max(self) -> int:
        """Maximum integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else QUINT8_MAX

    @property
    def num_steps(self) -> int:
        """Number of steps from 0 to ``quant_max`` (symmetric) or from ``quant_min`` to ``quant_max`` (affine)."""
        return self.quant_max if self.symmetric else self.quant_max - self.quant_min

    def choose_qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for the range from ``low`` to ``high``, widened to contain zero.

        Args:
            low: lower ends, any shape.
            high: upper ends, same shape.

        Returns:
            Scale (float32) and zero point (int32), same shape; a range of zeros only gets scale 1.
        """
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.num_steps
        else:
            scale = (high - low) / self.num_steps
        # Dividing by a zero or subnormal scale would produce NaN.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        if self.symmetric:
            return scale.float(), torch.zeros_like(scale).int()
        zero_point = self.quant_min + (-low / scale).round().clamp(0, self.num_steps)
        return scale.float(), zero_point.int()

    def squared_errors(self, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the mean squared quantization error of ``rows`` [n, values] with the ranges from low to high, [n].

        Args:
            rows: values; one row, [values], serves all ranges.
            low: lower ends, [n].
            high: upper ends, [n].
        """
        scale, zero_point = self.choose_qparams(low, high)
        return (self.fake_quantize(rows, scale[:, None], zero_point[:, None]) - rows).square().mean(1)

    def fake_quantize(self, rows: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Quantize and dequantize ``rows``; scale and zero point must broadcast against it."""
        integers = (rows / scale).round_().add_(zero_point).clamp_(self.quant_min, self.quant_max)
        return integers.sub_(zero_point).mul_(scale)
