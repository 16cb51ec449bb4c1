"""Writer of an :class:`IntegerGraph` in QDQ form, which onnxruntime fuses to integer kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import singledispatchmethod
from typing import cast

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qface.deployment import integer_graph as ir
from qface.deployment.nodes import Direct, NodeCollector, along_channels, assemble, convolution, window
from qface.deployment.prelu import prelu_table
from qface.deployment.runtime import WEIGHT_BITS
from qface.deployment.weight_formats import WeightFormat, make_weight_format
from qface.deployment.zero_points import bias_of, channel_zero_points, slope_bias_of

__all__ = ["to_onnx"]

_BYTE = 8
_HIGH = 255  # every uint8 kernel saturates there, so no Clip is needed
_ROWS = 2  # dimensions of [N, channels]
_MAP = 4  # dimensions of [N, channels, height, width]


def to_onnx(graph: ir.IntegerGraph, metadata: dict[str, str], weight_format: str = "packed") -> onnx.ModelProto:
    """Write ``graph`` as a QDQ model.

    The input is ``images`` [batch, 3, height, width], float32 or uint8; the output ``embedding`` [batch, D], float32.
    Activations are uint8; those of b bits use the top 2^b integers.

    Args:
        graph: output of :func:`qface.deployment.lowering.lower`, with either input type.
        metadata: entries to add to the preprocessing in the model's metadata.
        weight_format: storage of weights, ``"packed"`` or ``"int8"``.

    Raises:
        ConfigError: the weight format is unknown.
    """
    weights = make_weight_format(weight_format)
    bits = graph.weight_bits
    writer = _Writer(weights, shared_zeros=bits < _BYTE, only_summed=_only_summed(graph))
    for operation in graph.operations:
        writer.layer = operation.name
        writer.write(operation)
    writer.layer = "embedding"
    writer.node("Identity", [writer.float_name(graph.embedding)], "embedding")
    return assemble(graph, weights, writer.nodes, writer.initializers, {**metadata, WEIGHT_BITS: str(bits)})


class _Writer(NodeCollector):
    """Collector of QDQ nodes; tensors are named after the graph's values and dequantized on demand.

    Args:
        weights: weight storage.
        shared_zeros: let weights share their zero points, for smaller files. Must be False for 8-bit weights, because
            onnxruntime fails on shared ones where it shifts weights to uint8 (:mod:`qface.deployment.runtime`).
        only_summed: result of :func:`_only_summed`.
    """

    def __init__(self, weights: WeightFormat, shared_zeros: bool, only_summed: frozenset[str]) -> None:
        super().__init__()
        self.weights = weights
        self._shared_zeros = shared_zeros
        self._only_summed = only_summed
        self._dequantized: dict[str, str] = {}
        self._images: set[str] = set()
        self._named: dict[tuple[float, int], str] = {}
        self._borders: dict[tuple[int, ...], str] = {}

    @singledispatchmethod
    def write(self, operation: ir.IntegerOp) -> None:
        """Append the nodes of one operation."""
        raise NotImplementedError(type(operation).__name__)

    # ---- values

    def float_name(self, value: ir.Value) -> str:
        """Return the name of ``value`` in float; quantized values are dequantized once."""
        if value.qparams is None:
            return value.name
        if value.name not in self._dequantized:
            self._dequantized[value.name] = self._dequantize(value.name, value)
        return self._dequantized[value.name]

    def _dequantize(self, integers: str, value: ir.Value) -> str:
        """Dequantize ``integers`` with the qparams of ``value``."""
        return self.node("DequantizeLinear", [integers, *self._qparams(value)])

    def _quantize(self, floats: str, value: ir.Value, output: str | None = None) -> str:
        """Quantize ``floats`` with the qparams of ``value``, saturated to uint8."""
        return self.node("QuantizeLinear", [floats, *self._qparams(value)], output)

    def _qparams(self, value: ir.Value) -> tuple[str, str]:
        assert value.qparams is not None
        # Equal qparams share their initializers, for example those of a PReLU's input and output.
        name = self._named.setdefault((value.qparams.scale, value.qparams.zero_point), value.name)
        scale = self.constant(f"{name}_scale", np.float32(value.qparams.scale))
        return scale, self.constant(f"{name}_zero_point", np.uint8(value.qparams.zero_point))

    def _finish(self, value: ir.Value, floats: str, clamp: ir.Clamp | None = None) -> None:
        """Clamp ``floats``, quantize them if ``value`` has qparams, and name the result after ``value``."""
        if value.qparams is None:
            self.node("Identity", [self.clamped(floats, clamp)], value.name)
            return
        # Clamping after the rounding gives the same integers and lets onnxruntime fuse its integer kernel.
        limits = self._limits(*_clamped_range(value.qparams, clamp))
        if limits:
            self.node("Clip", [self._quantize(floats, value), *limits], value.name)
        else:
            self._quantize(floats, value, value.name)

    def _limits(self, low: int, high: int) -> list[str]:
        """Return the limits of a uint8 Clip; empty if the range of uint8 suffices."""
        limits = [self._byte(low) if low > 0 else ""]
        if high < _HIGH:
            limits.append(self._byte(high))
        return limits if any(limits) else []

    def _byte(self, integer: int) -> str:
        return self.constant(f"level_{integer}", np.uint8(integer))

    def _floats(self, operation: ir.IntegerOp) -> list[str]:
        return [self.float_name(value) for value in operation.inputs]

    # ---- operations

    @write.register
    def _(self, operation: ir.QuantizeImageOp) -> None:
        (images,) = operation.inputs
        self._images.add(operation.output.name)
        self._finish(operation.output, self.shifted(operation, images.name))

    @write.register
    def _(self, operation: ir.Uint8InputOp) -> None:
        self._images.add(operation.output.name)
        self.node("Identity", [self.pixels(operation)], operation.output.name)

    @write.register
    def _(self, operation: ir.NormalizeUint8Op) -> None:
        self._images.add(operation.output.name)
        floats = self.node("Cast", [self.pixels(operation)], to=TensorProto.FLOAT)
        self._finish(operation.output, self.normalized(operation, floats))

    @write.register
    def _(self, operation: ir.ConvolutionOp) -> None:
        (source,) = operation.inputs
        if source.qparams is not None and source.qparams.shifts and any(operation.padding):
            padded = ir.Value(self._padded_channels(operation, source), source.qparams)
            operation = replace(operation, inputs=(padded,), padding=(0, 0))
        product = self.node("Conv", self._matmul_inputs(operation), **convolution(operation))
        self._finish(operation.output, product, operation.clamp)

    def _padded_channels(self, operation: ir.ConvolutionOp, source: ir.Value) -> str:
        """Pad the integers of ``source``, whose channels have different zero points.

        Pad knows one value, so it pads with zeros, and a maximum with a constant raises the border.
        """
        assert source.qparams is not None
        top, left = operation.padding
        pads = self.constant(f"pads_{top}_{left}", np.array([0, 0, top, left, 0, 0, top, left]))
        padded = self.node("Pad", [source.name, pads, self._byte(0)])
        border = self._border(operation.size, operation.padding, pads)
        level = self.node("Where", [border, self._zeros(source), self._byte(0)])
        return self.node("Max", [padded, level])

    def _border(self, size: ir.Pair, padding: ir.Pair, pads: str) -> str:
        """Return the name of a bool [1, 1, height, width] that is True on the border of a padded map."""
        key = (*size, *padding)
        if key not in self._borders:
            shape = self.constant("map_{}_{}".format(*size), np.array([1, 1, *size]))
            false = numpy_helper.from_array(np.zeros(1, bool))
            inside = self.node("ConstantOfShape", [shape], value=false)
            self._borders[key] = self.node("Pad", [inside, pads, self.constant("true", np.array(True))])
        return self._borders[key]

    @write.register
    def _(self, operation: ir.LinearOp) -> None:
        inputs = self._matmul_inputs(operation)
        product = self.node("Gemm", inputs, transB=1)
        self._finish(operation.output, product, operation.clamp)

    def _matmul_inputs(self, operation: ir.ConvolutionOp | ir.LinearOp) -> list[str]:
        """Return the names of input, weight (per-channel scale) and bias, all dequantized."""
        (source,) = operation.inputs
        assert source.qparams is not None
        weight = operation.weight
        name = f"{operation.name}.weight"
        self.weights.add(name, weight)
        scale = self.constant(f"{name}_scale", weight.scale)
        # Only for images: after another integer convolution, onnxruntime 1.31 moves the Pad past it and fails.
        if source.name in self._images and _takes_three_channels(operation):
            floats, name = self._with_fourth_color(source, name)
        else:
            floats = self.float_name(source)
        inputs = [floats, self._factors(name, scale, (len(weight.scale),))]
        bias = bias_of(operation)
        if bias is not None:
            inputs.append(self._bias(operation.name, bias, source, scale))
        return inputs

    def _with_fourth_color(self, source: ir.Value, weight: str) -> tuple[str, str]:
        """Pad the image (dequantized) and the weight (integers) of the first convolution to four channels.

        Kernels process four products at a time: the convolution is twice as fast with 4 x 9 products as with 3 x 9.
        """
        after = self.constant("one_channel", np.array([0, 1]))
        channels = self.constant("channel_axis", np.array([1]))
        image = self.node("Pad", [source.name, after, self._qparams(source)[1], channels])
        return self._dequantize(image, source), self.node("Pad", [weight, after, "", channels])

    def _bias(self, layer: str, integers: ir.Int32, source: ir.Value, weight_scale: str) -> str:
        # onnxruntime fuses to an integer kernel only if the scale is exactly input scale x weight scale; it folds the
        # Mul at load time.
        scale = self.node("Mul", [self._qparams(source)[0], weight_scale])
        zeros = self.constant(f"zeros_int32_{len(integers)}", np.zeros_like(integers))
        return self.node("DequantizeLinear", [self.constant(f"{layer}.bias", integers), scale, zeros], axis=0)

    def _short(self, name: str, integers: ir.Int32) -> str:
        """Store int32 numbers in 16 bits if they fit; onnxruntime folds the Cast at load time."""
        stored = self.constant(name, integers.astype(np.min_scalar_type(-np.abs(integers).max())))
        return self.node("Cast", [stored], to=TensorProto.INT32)

    def _factors(self, integers: str, scale: str, shape: tuple[int, ...] = ()) -> str:
        """Dequantize weights whose ``scale`` has this shape: [channels], or () for per-tensor."""
        name = "_".join(map(str, ("zeros_int8" if self._shared_zeros else f"{integers}_zeros", *shape)))
        zeros = self.constant(name, np.zeros(shape, np.int8))
        return self.node("DequantizeLinear", [integers, scale, zeros], axis=0)

    @write.register
    def _(self, operation: ir.PReluOp) -> None:
        """Write a depthwise convolution with the slopes as weights, since PRelu has no integer kernel."""
        (source,) = operation.inputs
        if source.qparams is None or operation.output.qparams is None:
            inputs = [*self._floats(operation), self._float_slopes(operation)]
            self._finish(operation.output, self.node("PRelu", inputs))
            return
        table = prelu_table(operation)
        merge = table.merge
        integers = self._as_map(source.name, operation.rank)
        merged = (
            self.node(merge, [self._kept(operation, integers), self._scaled(operation, integers)])
            if merge
            else self._sum_of_halves(operation, integers)
        )
        low = operation.output.qparams.quant_min
        self._finish_map(operation, merged, (low if table.result.min() < low else 0, _HIGH))

    def _kept(self, operation: ir.PReluOp, integers: str) -> str:
        """Requantize ``integers`` to the qparams of the output."""
        before, after = operation.inputs[0].qparams, operation.output.qparams
        assert before is not None and after is not None
        if (before.scale, before.zero_point) == (after.scale, after.zero_point):
            return integers
        channels = len(operation.slopes)
        ones = self.constant(f"ones_{channels}", _depthwise(np.ones(channels, np.int8)))
        return self._depthwise_product(operation, integers, ones, self.constant("one", np.float32(1)))

    def _scaled(self, operation: ir.PReluOp, integers: str) -> str:
        """Multiply ``integers`` by the slopes and requantize to the qparams of the output."""
        slopes = self.constant(f"{operation.name}.slope", _depthwise(operation.slopes))
        scale = self.constant(f"{operation.name}.slope_scale", np.float32(operation.slope_scale))
        return self._depthwise_product(operation, integers, slopes, scale, slope_bias_of(operation))

    def _depthwise_product(
        self, operation: ir.PReluOp, integers: str, weight: str, scale: str, bias: ir.Int32 | None = None
    ) -> str:
        inputs = [self._dequantize(integers, operation.inputs[0]), self._factors(weight, scale)]
        if bias is not None:
            unit = self.node("Mul", [self._qparams(operation.inputs[0])[0], scale])
            integers = self._short(f"{operation.name}.slope_bias", bias)
            inputs.append(self.node("DequantizeLinear", [integers, unit]))
        product = self.node("Conv", inputs, kernel_shape=(1, 1), group=len(operation.slopes))
        return self._quantize(product, operation.output)

    def _sum_of_halves(self, operation: ir.PReluOp, integers: str) -> str:
        """Compute max(x, 0) + a * min(x, 0), for slopes on both sides of 1.

        One term is always zero, so the sum exceeds the result by one zero point; uint8 overflow cancels out.
        """
        (source,) = operation.inputs
        assert source.qparams is not None and operation.output.qparams is not None
        before, after = (self._zeros(value) for value in (source, operation.output))
        positive = self._kept(operation, self.node("Max", [integers, before]))
        negative = self._scaled(operation, self.node("Min", [integers, before]))
        return self.node("Sub", [self.node("Add", [positive, negative]), after])

    def _zeros(self, value: ir.Value) -> str:
        """Return the name of the zero points of ``value``: one byte, or one per channel of a map."""
        assert value.qparams is not None
        if not value.qparams.shifts:
            return self._byte(value.qparams.zero_point)
        zeros = along_channels(channel_zero_points(value.qparams), rank=_MAP).astype(np.uint8)
        return self.constant(f"{value.name}_zero_points", zeros)

    def _as_map(self, value: str, rank: int) -> str:
        """Reshape [N, channels] to [N, channels, 1, 1]; return other ranks unchanged."""
        return self.node("Unsqueeze", [value, self._map_axes()]) if rank == _ROWS else value

    def _finish_map(self, operation: ir.PReluOp | ir.AffineOp, integers: str, between: tuple[int, int]) -> None:
        """Clip ``integers`` and restore the rank and name of the operation's output."""
        limits = self._limits(*between)
        if limits:
            integers = self.node("Clip", [integers, *limits])
        if operation.rank == _ROWS:
            self.node("Squeeze", [integers, self._map_axes()], operation.output.name)
        else:
            self.nodes[-1].output[:] = [operation.output.name]

    def _map_axes(self) -> str:
        return self.constant("map_axes", np.array([2, 3]))

    def _float_slopes(self, operation: ir.PReluOp) -> str:
        slopes = operation.slopes * np.float32(operation.slope_scale)
        return self.constant(f"{operation.name}.slope", along_channels(slopes, operation.rank))

    @write.register
    def _(self, operation: ir.AffineOp) -> None:
        """Write a depthwise 1x1 convolution."""
        (source,) = operation.inputs
        assert operation.output.qparams is not None
        channels = len(operation.bias)
        name = f"{operation.name}.affine"
        scale = self.constant(f"{name}_scale", operation.weight.scale)
        weight = self.constant(name, _depthwise(operation.weight.integers))
        inputs = [
            self._dequantize(self._as_map(source.name, operation.rank), source),
            self._factors(weight, scale, (channels,)),
            self._bias(operation.name, cast(ir.Int32, bias_of(operation)), source, scale),
        ]
        product = self.node("Conv", inputs, kernel_shape=(1, 1), group=channels)
        between = _clamped_range(operation.output.qparams, operation.clamp)
        self._finish_map(operation, self._quantize(product, operation.output), between)

    @write.register
    def _(self, operation: ir.ClampOp) -> None:
        """Clip before the change of scale; otherwise onnxruntime merges the two roundings into one."""
        (source,) = operation.inputs
        if source.qparams is None:
            self._finish(operation.output, source.name, operation.clamp)
            return
        low, high = _clamped_range(replace(source.qparams, bits=_BYTE), operation.clamp)
        clipped = self.node("Clip", [source.name, self._byte(max(low - 1, 0)), self._byte(min(high + 1, _HIGH))])
        self._finish(operation.output, self._dequantize(clipped, source), operation.clamp)

    @write.register
    def _(self, operation: ir.FloatAffineOp) -> None:
        (floats,) = self._floats(operation)
        rank = operation.rank_after_dim
        scale = self.constant(f"{operation.name}.scale", along_channels(operation.scale, rank))
        shift = self.constant(f"{operation.name}.shift", along_channels(operation.shift, rank))
        self._finish(operation.output, self.node("Add", [self.node("Mul", [floats, scale]), shift]))

    @write.register
    def _(self, operation: ir.AddOp) -> None:
        summands = [self._summand(value) for value in operation.inputs]
        self._finish(operation.output, self.node("Add", summands), operation.clamp)

    def _summand(self, value: ir.Value) -> str:
        """Dequantize ``value``, after a second consumer of its integers if a sum is the only one.

        Otherwise OpenVINO fuses convolution and sum into one kernel, which adds before it rounds.
        """
        if value.name not in self._only_summed:
            return self.float_name(value)
        return self._dequantize(self.node("Max", [value.name, value.name]), value)

    @write.register
    def _(self, operation: ir.QuantizeOp) -> None:
        self._finish(operation.output, operation.inputs[0].name)

    @write.register
    def _(self, operation: ir.MoveOp) -> None:
        self.moved(operation, [value.name for value in operation.inputs], operation.output.name)

    @write.register
    def _(self, operation: ir.PadOp) -> None:
        (source,) = operation.inputs
        zero = self._qparams(source)[1] if source.qparams is not None else ""
        self.padded(operation, source.name, zero, operation.output.name)

    @write.register
    def _(self, operation: ir.FloatIslandOp) -> None:
        self.island(operation, self._floats(operation), [value.name for value in operation.outputs])

    @write.register
    def _(self, operation: Direct) -> None:
        self._finish(operation.output, self.direct(operation, self._floats(operation)))

    @write.register
    def _(self, operation: ir.MaxPoolOp) -> None:
        (source,) = operation.inputs
        attributes = {**window(operation), "dilations": operation.dilation}
        self.node("MaxPool", [source.name], operation.output.name, **attributes)

    @write.register
    def _(self, operation: ir.FlattenOp) -> None:
        (source,) = operation.inputs
        self.node("Flatten", [source.name], operation.output.name, axis=1)

    @write.register
    def _(self, operation: ir.L2NormalizeOp) -> None:
        self._finish(operation.output, self.node("LpNormalization", self._floats(operation), axis=1, p=2))


def _only_summed(graph: ir.IntegerGraph) -> frozenset[str]:
    """Return the names of convolution outputs whose only consumer is one sum."""
    readers = Counter(value.name for operation in graph.operations for value in operation.inputs)
    made = {each.output.name for each in graph.operations if isinstance(each, (ir.ConvolutionOp, ir.AffineOp))}
    sums = [operation for operation in graph.operations if isinstance(operation, ir.AddOp)]
    return frozenset(
        value.name
        for operation in sums
        for value in operation.inputs
        if value.qparams is not None and value.name in made and readers[value.name] == 1
    )


def _takes_three_channels(operation: ir.ConvolutionOp | ir.LinearOp) -> bool:
    return isinstance(operation, ir.ConvolutionOp) and (operation.groups, operation.weight.integers.shape[1]) == (1, 3)


def _clamped_range(qparams: ir.TensorQParams, clamp: ir.Clamp | None) -> tuple[int, int]:
    """Return the minimum and maximum integer after ``clamp``."""
    low, high = clamp if clamp is not None else (None, None)
    return (
        qparams.quant_min if low is None else max(_integer(low, qparams), qparams.quant_min),
        _HIGH if high is None else min(_integer(high, qparams), _HIGH),
    )


def _integer(value: float, qparams: ir.TensorQParams) -> int:
    return int(np.rint(np.float32(value) / np.float32(qparams.scale))) + qparams.zero_point


def _depthwise(integers: ir.Int8) -> ir.Int8:
    """Reshape [channels] to the weight of a depthwise 1x1 convolution."""
    return integers.reshape(-1, 1, 1, 1)
