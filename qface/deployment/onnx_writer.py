"""Writes an :class:`IntegerGraph` as an ONNX model in the QDQ form that onnxruntime turns into integer kernels."""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qface.deployment import graph as ir
from qface.deployment.containers import WeightContainer, make_container

__all__ = ["IR_VERSION", "OPSET", "to_onnx"]

OPSET = 18
IR_VERSION = 9  # onnx's own default is newer than what some runtimes read


def to_onnx(graph: ir.IntegerGraph, metadata: dict[str, str], container: str = "packed") -> onnx.ModelProto:
    """The QDQ model of ``graph``: input ``images`` [batch, 3, height, width], output ``embedding`` [batch, D], float32.

    Activations are uint8, clipped to their width.

    Args:
        graph: what :func:`qface.deployment.lowering.lower` returned.
        metadata: written into the model beside the preprocessing.
        container: how weights lie in the file, ``"packed"`` to their bits or as ``"int8"``.

    Raises:
        ConfigError: there is no such container.
    """
    weights = make_container(container)
    writer = _Writer(weights)
    for operation in graph.operations:
        writer.write(operation)
    weight_tensors, weight_nodes = weights.contents()
    height, width = graph.preprocessing.size
    body = helper.make_graph(
        [
            *weight_nodes,
            *writer.nodes,
            helper.make_node("Identity", [writer.float_name(graph.embedding)], ["embedding"]),
        ],
        "qface",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", graph.dimensions])],
        [*weight_tensors, *writer.initializers],
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qface"
    )
    helper.set_model_props(model, {"preprocessing": graph.preprocessing.to_json(), **metadata})
    return model


class _Writer:
    """Collects nodes and initializers.

    Values and constants are called after their layers; what lies between two values gets a number, because names would
    take a twelfth of a small network's file.
    """

    def __init__(self, weights: WeightContainer) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: set[str] = set()
        self._dequantized: dict[str, str] = {}
        self._numbered = 0

    @singledispatchmethod
    def write(self, operation: ir.Operation) -> None:
        """Append the nodes of one operation."""
        raise NotImplementedError(type(operation).__name__)

    # ---- values

    def float_name(self, value: ir.Value) -> str:
        """Name of the floats of ``value``, dequantized once where it lies on a grid."""
        if value.grid is None:
            return value.name
        if value.name not in self._dequantized:
            self._dequantized[value.name] = self._node("DequantizeLinear", [value.name, *self._qparams(value)])
        return self._dequantized[value.name]

    def _finish(self, value: ir.Value, floats: str, clamp: ir.Clamp | None = None) -> None:
        """Make ``value`` of ``floats``: clamped, and rounded to its grid or under another name."""
        if value.grid is None:
            self._node("Identity", [floats if clamp is None else self._clamped(floats, clamp)], value.name)
            return
        # Clamped behind the rounding, which comes to the same and leaves onnxruntime its integer kernel.
        low, high = _levels(value.grid, clamp)
        if (low, high) == (0, 255):
            self._node("QuantizeLinear", [floats, *self._qparams(value)], value.name)
            return
        rounded = self._node("QuantizeLinear", [floats, *self._qparams(value)])
        limits = [self._constant(f"level_{level}", np.uint8(level)) for level in (low, high)]
        self._node("Clip", [rounded, *limits], value.name)

    def _qparams(self, value: ir.Value) -> tuple[str, str]:
        assert value.grid is not None
        scale = self._constant(f"{value.name}_scale", np.float32(value.grid.scale))
        return scale, self._constant(f"{value.name}_zero_point", np.uint8(value.grid.zero_point))

    def _node(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output, a number unless it is given."""
        if output is None:
            self._numbered += 1
            output = str(self._numbered)
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _floats(self, operation: ir.Operation) -> list[str]:
        return [self.float_name(value) for value in operation.inputs]

    def _elementwise(self, operation: ir.Operation, kind: str, **attributes: Any) -> None:
        self._finish(operation.output, self._node(kind, self._floats(operation), **attributes))

    # ---- operations

    @write.register
    def _(self, operation: ir.QuantizeImage) -> None:
        (images,) = operation.inputs
        floats = images.name
        if operation.offset:
            offset = self._constant("image_offset", np.float32(operation.offset))
            floats = self._node("Sub", [floats, offset])
        self._finish(operation.output, floats)

    @write.register
    def _(self, operation: ir.Convolution) -> None:
        inputs = self._multiplication_inputs(operation)
        top, left = operation.padding
        product = self._node(
            "Conv",
            inputs,
            kernel_shape=operation.weight.integers.shape[2:],
            strides=operation.stride,
            pads=[top, left, top, left],
            dilations=operation.dilation,
            group=operation.groups,
        )
        self._finish(operation.output, product, operation.clamp)

    @write.register
    def _(self, operation: ir.Linear) -> None:
        inputs = self._multiplication_inputs(operation)
        product = self._node("Gemm", inputs, transB=1)
        self._finish(operation.output, product, operation.clamp)

    def _multiplication_inputs(self, operation: ir.Convolution | ir.Linear) -> list[str]:
        """Input, weight and bias, dequantized per output channel."""
        (source,) = operation.inputs
        assert source.grid is not None
        weight = operation.weight
        name = f"{operation.name}.weight"
        self.weights.add(name, weight.integers, weight.bits)
        scale = self._constant(f"{name}_scale", weight.scale)
        inputs = [self.float_name(source), self._per_channel(name, scale, len(weight.scale), np.int8)]
        if operation.bias is not None:
            # onnxruntime fuses to its integer kernel only where this is exactly input scale x weight scale; it
            # multiplies them when it opens the file.
            bias = self._constant(f"{operation.name}.bias", operation.bias)
            bias_scale = self._node("Mul", [self._qparams(source)[0], scale])
            inputs.append(self._per_channel(bias, bias_scale, len(weight.scale), np.int32))
        return inputs

    def _per_channel(self, integers: str, scale: str, channels: int, kind: type[np.signedinteger[Any]]) -> str:
        zero_points = self._constant(f"zeros_{kind.__name__}_{channels}", np.zeros(channels, kind))
        return self._node("DequantizeLinear", [integers, scale, zero_points], axis=0)

    def _clamped(self, floats: str, clamp: ir.Clamp) -> str:
        low, high = clamp
        if high is None:
            return self._node("Relu", [floats])
        return self._clip(floats, low, high)

    def _clip(self, floats: str, low: float, high: float) -> str:
        limits = [self._constant(f"limit_{limit:g}", np.float32(limit)) for limit in (low, high)]
        return self._node("Clip", [floats, *limits])

    @write.register
    def _(self, operation: ir.PRelu) -> None:
        """In exact terms of minimum and maximum, since onnxruntime's kernel for PRelu is slow."""
        (source,) = operation.inputs
        slopes = operation.slopes.astype(np.float32) * np.float32(operation.slope_scale)
        slope = self._slope(operation)
        if source.grid is None:
            self._finish(operation.output, self._node("PRelu", [source.name, slope]))
            return
        if slopes.min() < 1 < slopes.max():
            # max(x, 0) + a min(x, 0), of which one term is always zero.
            positive, negative = self._positive_and_negative(source)
            scaled = self._node("Mul", [negative, slope])
            self._finish(operation.output, self._node("Add", [positive, scaled]))
            return
        floats = self.float_name(source)
        scaled = self._node("Mul", [floats, slope])
        self._finish(operation.output, self._node("Max" if slopes.max() <= 1 else "Min", [floats, scaled]))

    def _slope(self, operation: ir.PRelu) -> str:
        """The slopes as floats; Cast and Mul are computed when the file is opened, DequantizeLinear would not be."""
        integers = self._constant(f"{operation.name}.slope", _along_channels(operation.slopes, operation.rank))
        scale = self._constant(f"{integers}_scale", np.float32(operation.slope_scale))
        return self._node("Mul", [self._node("Cast", [integers], to=TensorProto.FLOAT), scale])

    def _positive_and_negative(self, value: ir.Value) -> tuple[str, str]:
        """max(x, 0) and min(x, 0) of ``value`` on a grid: its bytes are clipped, which costs next to nothing."""
        assert value.grid is not None
        zero = self._constant(f"level_{value.grid.zero_point}", np.uint8(value.grid.zero_point))
        halves = [self._node("Clip", [value.name, zero, ""]), self._node("Clip", [value.name, "", zero])]
        positive, negative = (self._node("DequantizeLinear", [half, *self._qparams(value)]) for half in halves)
        return positive, negative

    @write.register
    def _(self, operation: ir.Activation) -> None:
        (floats,) = self._floats(operation)
        if operation.function == "Relu6":
            self._finish(operation.output, self._clip(floats, 0.0, 6.0))
        elif operation.function == "Silu":
            self._finish(operation.output, self._node("Mul", [floats, self._node("Sigmoid", [floats])]))
        else:
            self._elementwise(operation, operation.function, **operation.attributes)

    @write.register
    def _(self, operation: ir.Affine) -> None:
        (floats,) = self._floats(operation)
        scale = self._constant(f"{operation.name}.scale", _along_channels(operation.scale, operation.rank))
        shift = self._constant(f"{operation.name}.shift", _along_channels(operation.shift, operation.rank))
        self._finish(operation.output, self._node("Add", [self._node("Mul", [floats, scale]), shift]))

    @write.register
    def _(self, operation: ir.Add) -> None:
        self._elementwise(operation, "Add")

    @write.register
    def _(self, operation: ir.Multiply) -> None:
        self._elementwise(operation, "Mul")

    @write.register
    def _(self, operation: ir.Concat) -> None:
        self._elementwise(operation, "Concat", axis=operation.axis)

    @write.register
    def _(self, operation: ir.GlobalAveragePool) -> None:
        self._elementwise(operation, "GlobalAveragePool")

    @write.register
    def _(self, operation: ir.AveragePool) -> None:
        self._elementwise(
            operation,
            "AveragePool",
            **_window(operation),
            ceil_mode=int(operation.ceil_mode),
            count_include_pad=int(operation.count_include_pad),
        )

    @write.register
    def _(self, operation: ir.MaxPool) -> None:
        (source,) = operation.inputs
        attributes = {**_window(operation), "dilations": operation.dilation, "ceil_mode": int(operation.ceil_mode)}
        self._node("MaxPool", [source.name], operation.output.name, **attributes)

    @write.register
    def _(self, operation: ir.Flatten) -> None:
        (source,) = operation.inputs
        self._node("Flatten", [source.name], operation.output.name, axis=1)

    @write.register
    def _(self, operation: ir.L2Normalise) -> None:
        self._elementwise(operation, "LpNormalization", axis=1, p=2)


def _levels(grid: ir.Grid, clamp: ir.Clamp | None) -> tuple[int, int]:
    """Least and greatest integer of ``grid`` that ``clamp`` lets pass."""
    low, high = clamp if clamp is not None else (None, None)
    return (
        0 if low is None else max(_integer(low, grid), 0),
        2**grid.bits - 1 if high is None else min(_integer(high, grid), 2**grid.bits - 1),
    )


def _integer(value: float, grid: ir.Grid) -> int:
    return int(np.rint(np.float32(value) / np.float32(grid.scale))) + grid.zero_point


def _along_channels(values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    """In a shape that broadcasts along dimension 1 of ``rank``."""
    return values.reshape(-1, *(1,) * (rank - 2))


def _window(operation: ir.AveragePool | ir.MaxPool) -> dict[str, Any]:
    top, left = operation.padding
    return {"kernel_shape": operation.kernel, "strides": operation.stride, "pads": [top, left, top, left]}
