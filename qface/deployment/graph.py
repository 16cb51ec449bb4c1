"""The integer graph: what a student becomes before it is written for a runtime.

A straight list of operations over named values. A value on a :class:`Grid` is a uint8 tensor of ``2^bits`` levels that
stands for ``scale * (q - zero_point)``; a value without a grid is float32. The writer, and whatever else wants to know
what is deployed, reads this and never the student.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qface.preprocessing import Preprocessing

__all__ = [
    "Activation",
    "Add",
    "Affine",
    "AveragePool",
    "Concat",
    "Convolution",
    "Flatten",
    "FloatAffine",
    "GlobalAveragePool",
    "Grid",
    "IntegerGraph",
    "L2Normalise",
    "Linear",
    "MaxPool",
    "Multiply",
    "NormaliseBytes",
    "Operation",
    "PRelu",
    "QuantizeImage",
    "TakeBytes",
    "Value",
    "Weight",
]

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Pair = tuple[int, int]
Channels = tuple[int, int, int]
Clamp = tuple[float, float | None]


@dataclass(frozen=True)
class Grid:
    """Integers 256 - 2^bits .. 255 that stand for ``scale * (q - zero_point)``."""

    bits: int
    scale: float
    zero_point: int

    @property
    def low(self) -> int:
        """Least integer; the greatest is that of a byte, so that kernels clamp there by themselves."""
        return 256 - (1 << self.bits)


@dataclass(frozen=True)
class Value:
    """A tensor between operations; without a grid it is float32."""

    name: str
    grid: Grid | None = None


@dataclass(frozen=True)
class Weight:
    """Signed integers of ``bits`` bits, ``scale`` [out_channels] for each slice of dimension 0; zero point 0."""

    integers: Int8
    scale: Float32
    bits: int


@dataclass(frozen=True)
class Operation:
    """Base: named after the layer it comes from, with the values it reads and the one it makes."""

    name: str
    inputs: tuple[Value, ...]
    output: Value


@dataclass(frozen=True)
class QuantizeImage(Operation):
    """Normalised image to bytes, after ``offset`` is subtracted."""

    offset: float


@dataclass(frozen=True)
class TakeBytes(Operation):
    """The bytes of an RGB image, which lie on the grid of the output as they are.

    Args:
        channels: which of them comes where.
    """

    channels: Channels


@dataclass(frozen=True)
class NormaliseBytes(Operation):
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
class _Multiplication(Operation):
    """Convolution or linear layer: an int32 bias in units of input scale x weight scale, and a clamp before rounding.

    Args:
        clamp: None, or the least and greatest value (None for no limit) that a ReLU or ReLU6 lets pass.
    """

    weight: Weight
    bias: Int32 | None
    clamp: Clamp | None


@dataclass(frozen=True)
class Convolution(_Multiplication):
    """2-d convolution over zero padding (height, width at either side)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


@dataclass(frozen=True)
class Linear(_Multiplication):
    """Matrix product of [N, in] with the transposed weight [out, in]."""


@dataclass(frozen=True)
class _OnChannels(Operation):
    """Something of its own for each channel of ``x``.

    Args:
        rank: number of dimensions of ``x``; channels are dimension 1.
    """

    rank: int


@dataclass(frozen=True)
class PRelu(_OnChannels):
    """``x`` where positive, else ``slopes * slope_scale * x``; 8-bit slopes, one a channel.

    Between grids the products are rounded as those of a convolution, and so is ``x``.
    """

    slopes: Int8
    slope_scale: float


@dataclass(frozen=True)
class Activation(Operation):
    """An activation function by its ONNX name, with its attributes."""

    function: str
    attributes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Affine(_OnChannels):
    """A BatchNorm that does not fold, between grids: one 8-bit weight and one int32 bias a channel.

    Args:
        weight: [channels].
    """

    weight: Weight
    bias: Int32


@dataclass(frozen=True)
class FloatAffine(_OnChannels):
    """``scale[c] * x + shift[c]`` in float: a BatchNorm that does not fold, and has no grid before or behind it."""

    scale: Float32
    shift: Float32


@dataclass(frozen=True)
class Add(Operation):
    """Sum of two values."""


@dataclass(frozen=True)
class Multiply(Operation):
    """Product of two values."""


@dataclass(frozen=True)
class Concat(Operation):
    """Values one behind the other along ``axis``."""

    axis: int


@dataclass(frozen=True)
class GlobalAveragePool(Operation):
    """Mean over height and width, which become 1."""


@dataclass(frozen=True)
class _Window(Operation):
    """Something over windows of ``kernel`` (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool


@dataclass(frozen=True)
class AveragePool(_Window):
    """Mean over a window."""

    count_include_pad: bool


@dataclass(frozen=True)
class MaxPool(_Window):
    """Maximum over a window; stays on the grid of its input."""

    dilation: Pair


@dataclass(frozen=True)
class Flatten(Operation):
    """[N, ...] to [N, all the rest]; stays on the grid of its input."""


@dataclass(frozen=True)
class L2Normalise(Operation):
    """Rows divided by their Euclidean norm, in float."""


@dataclass(frozen=True)
class IntegerGraph:
    """A deployed network.

    Args:
        images: the input, [N, 3, height, width]: normalised floats, or RGB bytes where it has a grid.
        operations: in the order they run.
        embedding: the float output, [N, dimensions].
        preprocessing: what the network reads.
        dimensions: size of the embedding.
    """

    images: Value
    operations: tuple[Operation, ...]
    embedding: Value
    preprocessing: Preprocessing
    dimensions: int

    @property
    def weight_bits(self) -> int:
        """The greatest width of weights; 0 where there are none."""
        weighted = (Convolution, Linear)
        return max((each.weight.bits for each in self.operations if isinstance(each, weighted)), default=0)
