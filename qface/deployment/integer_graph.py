"""The integer graph: what a student becomes before it is written for a runtime.

A straight list of operations over named values. A value with :class:`TensorQParams` is a uint8 tensor of ``2^bits``
integers that stands for ``scale * (q - zero_point)``; a value without is float32. The writer, and whatever else wants
to know what is deployed, reads this and never the student.
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
    """The integers 256 - 2^bits .. 255 of a uint8 tensor stand for ``scale * (q - zero_point)``; plain numbers."""

    bits: int
    scale: float
    zero_point: int

    @property
    def quant_min(self) -> int:
        """Least integer."""
        return QUINT8_MAX + 1 - (1 << self.bits)

    @property
    def quant_max(self) -> int:
        """Greatest integer, which is that of a byte, so that kernels clamp there by themselves."""
        return QUINT8_MAX


@dataclass(frozen=True)
class Value:
    """A tensor between operations; without qparams it is float32."""

    name: str
    qparams: TensorQParams | None = None


@dataclass(frozen=True)
class Weight:
    """Signed integers of ``bits`` bits, ``scale`` [out_channels] for each slice of dimension 0; zero point 0."""

    integers: Int8
    scale: Float32
    bits: int


@dataclass(frozen=True)
class IntegerOp:
    """Base: named after the layer it comes from, with the values it reads and the one it makes."""

    name: str
    inputs: tuple[Value, ...]
    output: Value

    @property
    def kind(self) -> str:
        """The operation by its name in ONNX, where ONNX has such an operator: ``"AveragePool"``."""
        return type(self).__name__.removesuffix("Op")


@dataclass(frozen=True)
class QuantizeImageOp(IntegerOp):
    """Normalized image to bytes, after ``offset`` is subtracted."""

    offset: float


@dataclass(frozen=True)
class Uint8InputOp(IntegerOp):
    """The bytes of an RGB image, which are the integers of the output as they are.

    Args:
        channels: which of them comes where.
    """

    channels: Channels


@dataclass(frozen=True)
class NormalizeUint8Op(IntegerOp):
    """``(x - mean) / std`` of the bytes of an RGB image, in float32.

    Args:
        channels: which of them comes where.
        mean: in bytes, one a channel of the output.
        std: likewise.
    """

    channels: Channels
    mean: Float32
    std: Float32


@dataclass(frozen=True)
class _MatmulOp(IntegerOp):
    """Convolution or linear layer: an int32 bias in units of input scale x weight scale, and a clamp before rounding.

    Args:
        clamp: None, or the least and greatest value (None for no limit) that a ReLU or ReLU6 lets pass.
    """

    weight: Weight
    bias: Int32 | None
    clamp: Clamp | None


@dataclass(frozen=True)
class ConvolutionOp(_MatmulOp):
    """2-d convolution over zero padding (height, width at either side)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


@dataclass(frozen=True)
class LinearOp(_MatmulOp):
    """Matrix product of [N, in] with the transposed weight [out, in]."""


@dataclass(frozen=True)
class _ChannelwiseOp(IntegerOp):
    """Something of its own for each channel of ``x``.

    Args:
        rank: number of dimensions of ``x``; channels are dimension 1.
    """

    rank: int


@dataclass(frozen=True)
class PReluOp(_ChannelwiseOp):
    """``x`` where positive, else ``slopes * slope_scale * x``; 8-bit slopes, one a channel.

    Between quantized values the products are rounded as those of a convolution, and so is ``x``.
    """

    slopes: Int8
    slope_scale: float


@dataclass(frozen=True)
class SigmoidOp(IntegerOp):
    """``1 / (1 + exp(-x))``."""


@dataclass(frozen=True)
class AffineOp(_ChannelwiseOp):
    """A BatchNorm that does not fold, between quantized values: one 8-bit weight and one int32 bias a channel.

    Args:
        weight: [channels].
        clamp: as of a convolution.
    """

    weight: Weight
    bias: Int32
    clamp: Clamp | None


@dataclass(frozen=True)
class ClampOp(IntegerOp):
    """Values limited to those between the two of ``clamp``."""

    clamp: Clamp


@dataclass(frozen=True)
class FloatAffineOp(_ChannelwiseOp):
    """``scale[c] * x + shift[c]`` in float: a BatchNorm that does not fold, without a quantizer before or behind it.

    Args:
        dim: the dimension of the channels.
    """

    dim: int
    scale: Float32
    shift: Float32

    @property
    def rank_after_dim(self) -> int:
        """Rank of a tensor whose dimension 1 has as many after it as the channels have here."""
        return self.rank - self.dim % self.rank + 1


@dataclass(frozen=True)
class QuantizeOp(IntegerOp):
    """Float values rounded to integers, after a float island."""


@dataclass(frozen=True)
class AddOp(IntegerOp):
    """Sum of two values, and a clamp before rounding."""

    clamp: Clamp | None = None


@dataclass(frozen=True)
class MaxOp(IntegerOp):
    """Elementwise maximum of two values."""


@dataclass(frozen=True)
class MoveOp(IntegerOp):
    """Values in another place or shape, by one ONNX operator; they keep the qparams of the input.

    Args:
        operator: of ONNX, which computes with any type.
        operands: further inputs, constants; None is an input that is left out.
        attributes: of the node.
    """

    operator: str
    operands: tuple[npt.NDArray[Any] | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PadOp(IntegerOp):
    """Height and width extended, by zeros or by what is at the edge; the qparams stay.

    Args:
        pads: before and after each of the four dimensions, as ONNX orders them.
        mode: ``"constant"``, ``"reflect"`` or ``"edge"``.
    """

    pads: tuple[int, ...]
    mode: str


@dataclass(frozen=True)
class FloatIslandOp(IntegerOp):
    """Layers without an integer form, which compute in float32 on dequantized inputs.

    Args:
        outputs: all values that are made, float; ``output`` is the first of them.
        module: computes them, as a tuple, of the inputs.
        shapes: of the inputs, for two images.
        dtypes: of the inputs; what one island makes for another may be integers or booleans.
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
    """Values one behind the other along ``axis``."""

    axis: int


@dataclass(frozen=True)
class GlobalAveragePoolOp(IntegerOp):
    """Mean over height and width, which become 1."""


@dataclass(frozen=True)
class _PoolOp(IntegerOp):
    """Something over windows of ``kernel`` (height, width)."""

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
    """[N, ...] to [N, all the rest]; keeps the qparams of its input."""


@dataclass(frozen=True)
class L2NormalizeOp(IntegerOp):
    """Rows divided by their Euclidean norm, in float."""


@dataclass(frozen=True)
class IntegerGraph:
    """A deployed network.

    Args:
        images: the input, [N, 3, height, width]: normalized floats, or RGB bytes where it has qparams.
        operations: in the order they run.
        embedding: the float output, [N, dimensions].
        preprocessing: what the network reads.
        dimensions: size of the embedding.
    """

    images: Value
    operations: tuple[IntegerOp, ...]
    embedding: Value
    preprocessing: Preprocessing
    dimensions: int

    @property
    def weight_bits(self) -> int:
        """The most bits of any weight; 0 where there are none."""
        weighted = (ConvolutionOp, LinearOp)
        return max((each.weight.bits for each in self.operations if isinstance(each, weighted)), default=0)

    def with_unit_length(self) -> IntegerGraph:
        """This graph, whose embedding is divided by its Euclidean norm, in float."""
        normalize = L2NormalizeOp("unit_length", (self.embedding,), Value("embedding:unit_length"))
        return replace(self, operations=(*self.operations, normalize), embedding=normalize.output)
