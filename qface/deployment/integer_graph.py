"""Integer graph: the form of a student between lowering and the writers of ONNX.

It is a list of operations over named values. A value with :class:`TensorQParams` is a uint8 tensor with ``2^bits``
levels, which represents ``scale * (q - zero_point)``, perhaps with one zero point per channel; a value without is
float32. All code after lowering uses this graph and never the student.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from qface.preprocessing import Preprocessing
from qface.quantization.qparams import QUINT8_MAX

__all__ = [
    "AddOp",
    "AffineOp",
    "AveragePoolOp",
    "ClampOp",
    "ConcatOp",
    "ConvolutionOp",
    "FlattenOp",
    "FloatAffineOp",
    "FloatIslandOp",
    "GlobalAveragePoolOp",
    "IntegerGraph",
    "IntegerOp",
    "L2NormalizeOp",
    "LinearOp",
    "MaxOp",
    "MaxPoolOp",
    "MoveOp",
    "MultiplyOp",
    "NormalizeUint8Op",
    "PReluOp",
    "PadOp",
    "QuantizeImageOp",
    "QuantizeOp",
    "SigmoidOp",
    "TensorQParams",
    "Uint8InputOp",
    "Value",
    "Weight",
]

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Pair = tuple[int, int]
Channels = tuple[int, int, int]
Clamp = tuple[float | None, float | None]


@dataclass(frozen=True)
class TensorQParams:
    """Per-tensor scale and zero point of a uint8 tensor with the levels 256 - 2^bits .. 255.

    Args:
        bits: 2 to 8.
        scale: one step.
        zero_point: integer of zero.
        shifts: by how much the zero point of each channel exceeds ``zero_point``; empty if no channel differs.
    """

    bits: int
    scale: float
    zero_point: int
    shifts: tuple[int, ...] = ()

    @property
    def quant_min(self) -> int:
        """Minimum integer."""
        return QUINT8_MAX + 1 - (1 << self.bits)

    @property
    def quant_max(self) -> int:
        """Maximum integer, always 255, so that the saturation of uint8 kernels clamps there."""
        return QUINT8_MAX


@dataclass(frozen=True)
class Value:
    """A tensor between operations; without qparams it is float32."""

    name: str
    qparams: TensorQParams | None = None


@dataclass(frozen=True)
class Weight:
    """Signed integers with one scale per slice of dimension 0, a channel, and zero point 0.

    Args:
        integers: int8 [C, ...], ``stride * q + offset`` with a signed q of ``bits`` bits.
        scale: float32 [C].
        bits: 2 to 8.
        offset: int8 [C]; None for zeros.
        stride: 1 or 2.
    """

    integers: Int8
    scale: Float32
    bits: int
    offset: Int8 | None = None
    stride: int = 1

    @property
    def codes(self) -> Int8:
        """The q that are stored."""
        integers = self.integers.astype(np.int16) - (0 if self.offset is None else self.column)
        return (integers // self.stride).astype(np.int8)

    @property
    def column(self) -> Int8:
        """The offsets in a shape that broadcasts against the integers."""
        assert self.offset is not None
        return self.offset.reshape(-1, *(1,) * (self.integers.ndim - 1))


@dataclass(frozen=True)
class IntegerOp:
    """Base of operations, with the name of the layer, the input values and the output value."""

    name: str
    inputs: tuple[Value, ...]
    output: Value

    @property
    def kind(self) -> str:
        """Name of the ONNX operator, if there is one for the operation, such as ``"AveragePool"``."""
        return type(self).__name__.removesuffix("Op")


@dataclass(frozen=True)
class QuantizeImageOp(IntegerOp):
    """Subtraction of ``offset`` from a normalized image and quantization to uint8."""

    offset: float


@dataclass(frozen=True)
class Uint8InputOp(IntegerOp):
    """RGB bytes used directly as the integers of the output.

    Args:
        channels: for each output channel, the index of the RGB channel.
    """

    channels: Channels


@dataclass(frozen=True)
class NormalizeUint8Op(IntegerOp):
    """Normalization of RGB bytes to ``(x - mean) / std`` in float32.

    Args:
        channels: for each output channel, the index of the RGB channel.
        mean: mean per output channel, 0 to 255.
        std: standard deviation per output channel, on the same scale.
    """

    channels: Channels
    mean: Float32
    std: Float32


@dataclass(frozen=True)
class _MatmulOp(IntegerOp):
    """Convolution or linear layer with an optional clamp before requantization.

    Args:
        bias: in units of input scale x weight scale.
        clamp: minimum and maximum of a fused ReLU or ReLU6 (None for no limit); None without one.
    """

    weight: Weight
    bias: Int32 | None
    clamp: Clamp | None


@dataclass(frozen=True)
class ConvolutionOp(_MatmulOp):
    """2-d convolution with zero padding (height, width), equal on both sides.

    Args:
        size: height and width of the input.
    """

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


@dataclass(frozen=True)
class LinearOp(_MatmulOp):
    """Matrix product of the input [N, in] and the transposed weight [out, in]."""


@dataclass(frozen=True)
class _ChannelwiseOp(IntegerOp):
    """Base of operations with per-channel parameters.

    Args:
        rank: number of dimensions of the input; channels are dimension 1.
    """

    rank: int


@dataclass(frozen=True)
class PReluOp(_ChannelwiseOp):
    """PReLU with 8-bit per-channel slopes: ``x`` if positive, else ``slopes * slope_scale * x``.

    Between quantized values, both branches are requantized as the output of a convolution.
    """

    slopes: Int8
    slope_scale: float


@dataclass(frozen=True)
class SigmoidOp(IntegerOp):
    """Sigmoid, ``1 / (1 + exp(-x))``."""


@dataclass(frozen=True)
class AffineOp(_ChannelwiseOp):
    """Unfolded BatchNorm between quantized values, with per-channel 8-bit weight and int32 bias.

    Args:
        weight: [channels].
        bias: [channels], in units of input scale x weight scale.
        clamp: as for a convolution.
    """

    weight: Weight
    bias: Int32
    clamp: Clamp | None


@dataclass(frozen=True)
class ClampOp(IntegerOp):
    """Clamp to the minimum and maximum in ``clamp``."""

    clamp: Clamp


@dataclass(frozen=True)
class FloatAffineOp(_ChannelwiseOp):
    """Unfolded BatchNorm in float, ``scale[c] * x + shift[c]``, with a float input or output.

    Args:
        dim: dimension of the channels.
    """

    dim: int
    scale: Float32
    shift: Float32

    @property
    def rank_after_dim(self) -> int:
        """Rank of a tensor with channels in dimension 1 and as many dimensions after them as here."""
        return self.rank - self.dim % self.rank + 1


@dataclass(frozen=True)
class QuantizeOp(IntegerOp):
    """Quantization of float values after a float island."""


@dataclass(frozen=True)
class AddOp(IntegerOp):
    """Sum of two values, with an optional clamp before requantization."""

    clamp: Clamp | None = None


@dataclass(frozen=True)
class MaxOp(IntegerOp):
    """Elementwise maximum of two values."""


@dataclass(frozen=True)
class MoveOp(IntegerOp):
    """Change of order or shape by one ONNX operator that accepts any type; keeps the qparams of the input.

    Args:
        operator: name of the ONNX operator.
        operands: constant inputs after the first; None omits an optional input.
        attributes: attributes of the node.
    """

    operator: str
    operands: tuple[npt.NDArray[Any] | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PadOp(IntegerOp):
    """Padding of channels, height and width; keeps the qparams of the input.

    Args:
        pads: begin of all four dimensions, then end of all four, as in ONNX.
        mode: ``"constant"`` (zeros), ``"reflect"`` or ``"edge"``.
    """

    pads: tuple[int, ...]
    mode: str


@dataclass(frozen=True)
class FloatIslandOp(IntegerOp):
    """Layers without an integer form, computed in float32 on dequantized inputs.

    Args:
        outputs: all output values, float; ``output`` is the first of them.
        module: network from the inputs to a tuple of the outputs.
        shapes: input shapes for a batch of two images.
        dtypes: input dtypes; values between two islands may be integers or booleans.
    """

    outputs: tuple[Value, ...]
    module: fx.GraphModule
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class MultiplyOp(IntegerOp):
    """Product of two values."""


@dataclass(frozen=True)
class ConcatOp(IntegerOp):
    """Concatenation along ``axis``."""

    axis: int


@dataclass(frozen=True)
class GlobalAveragePoolOp(IntegerOp):
    """Mean over height and width, [N, C, H, W] to [N, C, 1, 1]."""


@dataclass(frozen=True)
class _PoolOp(IntegerOp):
    """Base of pooling over windows of size ``kernel`` (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool


@dataclass(frozen=True)
class AveragePoolOp(_PoolOp):
    """Mean over a window."""

    count_include_pad: bool


@dataclass(frozen=True)
class MaxPoolOp(_PoolOp):
    """Maximum over a window; keeps the qparams of its input."""

    dilation: Pair


@dataclass(frozen=True)
class FlattenOp(IntegerOp):
    """Reshape of [N, ...] to [N, features]; keeps the qparams of its input."""


@dataclass(frozen=True)
class L2NormalizeOp(IntegerOp):
    """Division of each row by its Euclidean norm, in float."""


@dataclass(frozen=True)
class IntegerGraph:
    """Network of integer operations.

    Args:
        images: input [N, 3, height, width]: normalized floats, or RGB bytes if it has qparams.
        operations: operations in execution order.
        embedding: output [N, dimensions], float.
        preprocessing: preprocessing of the network.
        dimensions: embedding dimension.
    """

    images: Value
    operations: tuple[IntegerOp, ...]
    embedding: Value
    preprocessing: Preprocessing
    dimensions: int

    @property
    def weight_bits(self) -> int:
        """Maximum bits of all convolution and linear weights; 0 without any."""
        weighted = (ConvolutionOp, LinearOp)
        return max((each.weight.bits for each in self.operations if isinstance(each, weighted)), default=0)

    def with_unit_length(self) -> IntegerGraph:
        """Return the graph with a final L2 normalization of the embedding, in float."""
        normalize = L2NormalizeOp("unit_length", (self.embedding,), Value("embedding:unit_length"))
        return replace(self, operations=(*self.operations, normalize), embedding=normalize.output)
