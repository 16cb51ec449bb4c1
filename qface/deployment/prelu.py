"""Tables of a PReLU between two quantized values: its result for each of the 256 integers that it may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.deployment.integer_graph import Int32, PReluOp, TensorQParams

__all__ = ["PReluTable", "prelu_table"]


@dataclass(frozen=True)
class PReluTable:
    """Integers made of the integers 0 .. 255, as onnxruntime's kernels make them.

    Args:
        kept: of the value as it is, [256, 1].
        scaled: of the value times the slopes, [256, channels].
        positive: where the value is above zero, [256, 1].
    """

    kept: Int32
    scaled: Int32
    positive: npt.NDArray[np.bool_]

    @property
    def result(self) -> Int32:
        """Results of the PReLU, [256, channels]."""
        return np.where(self.positive, self.kept, self.scaled)

    @property
    def merge(self) -> str | None:
        """The operator that makes the result of ``kept`` and ``scaled``: Max where no slope is above 1, Min where none
        is below; None where only a case distinction does."""
        for name, operator in (("Max", np.maximum), ("Min", np.minimum)):
            if np.array_equal(operator(self.kept, self.scaled), self.result):
                return name
        return None


def prelu_table(operation: PReluOp) -> PReluTable:
    """The table of a PReLU whose input and output are quantized."""
    (source,) = operation.inputs
    before, behind = source.qparams, operation.output.qparams
    assert before is not None and behind is not None
    values = np.arange(256, dtype=np.float32)[:, None] - np.float32(before.zero_point)
    kept = _requantized(values, before, np.float32(1), behind)
    products = values * operation.slopes.astype(np.float32)
    scaled = _requantized(products, before, np.float32(operation.slope_scale), behind)
    return PReluTable(kept, scaled, values > 0)


def _requantized(
    sums: npt.NDArray[np.float32], before: TensorQParams, weight_scale: np.float32, behind: TensorQParams
) -> Int32:
    """As in :func:`qface.quantization.kernels.requantize`, with zero point and saturation."""
    factor: Any = np.float32(np.float32(before.scale) * weight_scale) / np.float32(behind.scale)
    integers: Int32 = (np.rint(sums * np.float32(factor)) + behind.zero_point).clip(0, 255).astype(np.int32)
    return integers
