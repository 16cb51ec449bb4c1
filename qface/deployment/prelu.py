"""Lookup tables of a PReLU between two quantized values, with one row per input integer 0 .. 255."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.deployment.integer_graph import Int32, PReluOp, TensorQParams
from qface.deployment.zero_points import slope_bias_of

__all__ = ["PReluTable", "prelu_table"]


@dataclass(frozen=True)
class PReluTable:
    """Output integers for the input integers 0 .. 255, equal to those of onnxruntime's kernels.

    Args:
        kept: requantized input value, [256, 1].
        scaled: requantized product of input value and slope, [256, channels].
        positive: True if the input value is above zero, [256, 1], or [256, channels] with zero points per channel.
    """

    kept: Int32
    scaled: Int32
    positive: npt.NDArray[np.bool_]

    @property
    def result(self) -> Int32:
        """Output integers of the PReLU, [256, channels]."""
        return np.where(self.positive, self.kept, self.scaled)

    @property
    def merge(self) -> str | None:
        """ONNX operator that computes ``result`` from ``kept`` and ``scaled``, or None.

        It is Max if all slopes are <= 1 and Min if all are >= 1; mixed slopes need a Where.
        """
        for name, operator in (("Max", np.maximum), ("Min", np.minimum)):
            if np.array_equal(operator(self.kept, self.scaled), self.result):
                return name
        return None


def prelu_table(operation: PReluOp) -> PReluTable:
    """Compute the table of a PReLU whose input and output are quantized."""
    (source,) = operation.inputs
    before, after = source.qparams, operation.output.qparams
    assert before is not None and after is not None
    stored = np.arange(256, dtype=np.float32)[:, None] - np.float32(before.zero_point)
    bias = slope_bias_of(operation)
    products = stored * operation.slopes.astype(np.float32)
    kept = _requantized(stored, before, np.float32(1), after)
    scaled = _requantized(
        products if bias is None else products + bias, before, np.float32(operation.slope_scale), after
    )
    values = stored - np.array(before.shifts or (0,), np.float32)
    return PReluTable(kept, scaled, values > 0)


def _requantized(
    sums: npt.NDArray[np.float32], before: TensorQParams, weight_scale: np.float32, after: TensorQParams
) -> Int32:
    """Requantize as :func:`qface.quantization.kernels.requantize`, with zero point and saturation."""
    factor: Any = np.float32(np.float32(before.scale) * weight_scale) / np.float32(after.scale)
    integers: Int32 = (np.rint(sums * np.float32(factor)) + after.zero_point).clip(0, 255).astype(np.int32)
    return integers
