"""Writer of an :class:`IntegerGraph` as an fp16 (GPUs) or float32 (browsers) ONNX model.

onnxruntime's CUDA provider has no integer convolution, and its integer kernels in WebAssembly are slower than float32.
So only the stored weights are integers. Cast and Mul dequantize them; onnxruntime folds these at load time, but would
keep DequantizeLinear. Activations are not rounded.
"""

from __future__ import annotations

from functools import singledispatchmethod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qface.deployment import integer_graph as ir
from qface.deployment.nodes import Direct, NodeCollector, along_channels, assemble, convolution, window
from qface.deployment.weight_formats import WeightFormat, make_weight_format

__all__ = ["FLOAT_TARGETS", "to_float_onnx"]

FLOAT_TARGETS: dict[str, type[np.floating[Any]]] = {"cuda": np.float16, "float32": np.float32}
"""Float type of the computation, by target."""

_FP32 = TensorProto.FLOAT


def to_float_onnx(
    graph: ir.IntegerGraph,
    metadata: dict[str, str],
    weight_format: str = "packed",
    number: type[np.floating[Any]] = np.float32,
) -> onnx.ModelProto:
    """Write ``graph`` as a model that computes in float.

    The input is ``images`` [batch, 3, height, width], float32 or uint8; the output ``embedding`` [batch, D], float32.

    Args:
        graph: output of :func:`qface.deployment.lowering.lower`, with either input type.
        metadata: entries to add to the preprocessing in the model's metadata.
        weight_format: storage of weights, ``"packed"`` or ``"int8"``.
        number: float type of the computation, ``np.float16`` or ``np.float32``.

    Raises:
        ConfigError: the weight format is unknown.

    Example:
        >>> from qface.deployment.lowering import lower
        >>> to_float_onnx(lower(student), {}, number=np.float16).graph.output[0].name
        'embedding'
    """
    weights = make_weight_format(weight_format)
    writer = _FloatWriter(weights, graph.images, number)
    for operation in graph.operations:
        writer.layer = operation.name
        writer.write(operation)
    writer.layer = "embedding"
    writer.node("Identity", [writer.fp32(graph.embedding)], "embedding")
    return assemble(graph, weights, writer.nodes, writer.initializers, metadata)


class _FloatWriter(NodeCollector):
    """Collector of float nodes; it keeps each value in its original dtype and casts it on demand."""

    def __init__(self, weights: WeightFormat, images: ir.Value, number: type[np.floating[Any]]) -> None:
        super().__init__(number)
        self.weights = weights
        self._number_type = helper.np_dtype_to_tensor_dtype(np.dtype(number))
        self._tensors: dict[str, dict[int, str]] = {}
        self._keep(images, images.name, _FP32 if images.qparams is None else TensorProto.UINT8)

    @singledispatchmethod
    def write(self, operation: ir.IntegerOp) -> None:
        """Append the nodes of one operation."""
        raise NotImplementedError(type(operation).__name__)

    # ---- values

    def fp32(self, value: ir.Value) -> str:
        """Return the name of ``value`` in float32."""
        return self._typed(value, _FP32)

    def as_number(self, value: ir.Value) -> str:
        """Return the name of ``value`` in the float type of the computation."""
        return self._typed(value, self._number_type)

    def _typed(self, value: ir.Value, kind: int) -> str:
        tensors = self._tensors[value.name]
        if kind not in tensors:
            made = next(iter(tensors.values()))
            tensors[kind] = self._cast(made, kind)
        return tensors[kind]

    def _keep(self, value: ir.Value, tensor: str, kind: int | None = None) -> None:
        """Register ``tensor`` as ``value`` in dtype ``kind``, by default the float type of the computation."""
        self._tensors[value.name] = {kind or self._number_type: tensor}

    def _cast(self, tensor: str, kind: int) -> str:
        return self.node("Cast", [tensor], to=kind)

    def _narrowed(self, tensor: str) -> str:
        """Cast the float32 ``tensor`` to the float type of the computation."""
        return tensor if self._number_type == _FP32 else self._cast(tensor, self._number_type)

    def _inputs(self, operation: ir.IntegerOp) -> list[str]:
        return [self.as_number(value) for value in operation.inputs]

    def _elementwise(self, operation: ir.IntegerOp, kind: str, **attributes: Any) -> None:
        """Append one node of type ``kind``, with inputs and output in the float type of the computation."""
        self._keep(operation.output, self.node(kind, self._inputs(operation), **attributes))

    # ---- integers of the file

    def _dequantized(self, integers: str, scale: str) -> str:
        """Multiply ``integers`` by ``scale`` in float32 and cast; onnxruntime folds both at load time."""
        return self._narrowed(self.node("Mul", [self._cast(integers, _FP32), scale]))

    def _matmul_inputs(self, operation: ir.ConvolutionOp | ir.LinearOp) -> list[str]:
        """Return the names of input, weight and bias."""
        (source,) = operation.inputs
        weight, rank = operation.weight, operation.weight.integers.ndim
        name = f"{operation.name}.weight"
        self.weights.add(name, weight)
        scale = self.constant(f"{name}_scale", weight.scale)
        column = self.constant(f"column_{rank}", np.array([-1, *(1,) * (rank - 1)]))
        inputs = [self.as_number(source), self._dequantized(name, self.node("Reshape", [scale, column]))]
        if operation.bias is not None:
            inputs.append(self._bias(f"{operation.name}.bias", operation.bias, source, scale))
        return inputs

    def _bias(self, name: str, integers: ir.Int32, source: ir.Value, weight_scale: str) -> str:
        """Dequantize a bias in units of input scale x weight scale."""
        assert source.qparams is not None
        input_scale = self.constant(f"{source.name}_scale", np.float32(source.qparams.scale))
        return self._dequantized(self.constant(name, integers), self.node("Mul", [input_scale, weight_scale]))

    # ---- images

    @write.register
    def _(self, operation: ir.QuantizeImageOp) -> None:
        (images,) = operation.inputs
        self._keep(operation.output, self.shifted(operation, self.fp32(images)), _FP32)

    @write.register
    def _(self, operation: ir.Uint8InputOp) -> None:
        qparams = operation.output.qparams
        assert qparams is not None
        zero_point = self.constant("image_zero_point", np.float32(qparams.zero_point))
        centered = self.node("Sub", [self._cast(self.pixels(operation), _FP32), zero_point])
        scale = self.constant("image_scale", np.float32(qparams.scale))
        self._keep(operation.output, self.node("Mul", [centered, scale]), _FP32)

    @write.register
    def _(self, operation: ir.NormalizeUint8Op) -> None:
        self._keep(operation.output, self.normalized(operation, self._cast(self.pixels(operation), _FP32)), _FP32)

    # ---- operations

    @write.register
    def _(self, operation: ir.ConvolutionOp) -> None:
        product = self.node("Conv", self._matmul_inputs(operation), **convolution(operation))
        self._keep(operation.output, self.clamped(product, operation.clamp))

    @write.register
    def _(self, operation: ir.LinearOp) -> None:
        product = self.node("Gemm", self._matmul_inputs(operation), transB=1)
        self._keep(operation.output, self.clamped(product, operation.clamp))

    @write.register
    def _(self, operation: ir.PReluOp) -> None:
        integers = self.constant(f"{operation.name}.slope", along_channels(operation.slopes, operation.rank))
        scale = self.constant(f"{integers}_scale", np.float32(operation.slope_scale))
        self._keep(operation.output, self.node("PRelu", [*self._inputs(operation), self._dequantized(integers, scale)]))

    @write.register
    def _(self, operation: ir.AffineOp) -> None:
        (source,) = operation.inputs
        name, weight, rank = f"{operation.name}.weight", operation.weight, operation.rank
        scale = self.constant(f"{name}_scale", along_channels(weight.scale, rank))
        factor = self._dequantized(self.constant(name, along_channels(weight.integers, rank)), scale)
        bias = self._bias(f"{operation.name}.bias", along_channels(operation.bias, rank), source, scale)
        self._affine(operation, factor, bias, operation.clamp)

    @write.register
    def _(self, operation: ir.ClampOp) -> None:
        (x,) = self._inputs(operation)
        self._keep(operation.output, self.clamped(x, operation.clamp))

    @write.register
    def _(self, operation: ir.FloatAffineOp) -> None:
        scale, shift = (
            self._narrowed(self.constant(f"{operation.name}.{name}", along_channels(values, operation.rank_after_dim)))
            for name, values in (("scale", operation.scale), ("shift", operation.shift))
        )
        self._affine(operation, scale, shift)

    def _affine(self, operation: ir.IntegerOp, factor: str, summand: str, clamp: ir.Clamp | None = None) -> None:
        scaled = self.node("Mul", [*self._inputs(operation), factor])
        self._keep(operation.output, self.clamped(self.node("Add", [scaled, summand]), clamp))

    @write.register
    def _(self, operation: ir.AddOp) -> None:
        # Sorted, so that a sum that the student quantizes twice, to different bits, becomes two equal nodes, which
        # onnxruntime merges.
        total = self.node("Add", sorted(self._inputs(operation)))
        self._keep(operation.output, self.clamped(total, operation.clamp))

    @write.register
    def _(self, operation: ir.QuantizeOp) -> None:
        self._keep(operation.output, self.as_number(operation.inputs[0]))

    @write.register
    def _(self, operation: ir.MoveOp) -> None:
        self._keep(operation.output, self.moved(operation, self._inputs(operation)))

    @write.register
    def _(self, operation: ir.PadOp) -> None:
        self._keep(operation.output, self.padded(operation, self.as_number(operation.inputs[0]), ""))

    @write.register
    def _(self, operation: ir.FloatIslandOp) -> None:
        """Write the island in float32: it may hold norms and exponentials, which overflow in fp16."""
        made = self.island(operation, [self.fp32(value) for value in operation.inputs])
        for value, tensor in zip(operation.outputs, made, strict=True):
            self._keep(value, tensor, _FP32)

    @write.register
    def _(self, operation: Direct) -> None:
        self._keep(operation.output, self.direct(operation, self._inputs(operation)))

    @write.register
    def _(self, operation: ir.MaxPoolOp) -> None:
        self._elementwise(operation, "MaxPool", **window(operation), dilations=operation.dilation)

    @write.register
    def _(self, operation: ir.FlattenOp) -> None:
        self._elementwise(operation, "Flatten", axis=1)

    @write.register
    def _(self, operation: ir.L2NormalizeOp) -> None:
        """Normalize in float32, because squares overflow in fp16."""
        (source,) = operation.inputs
        self._keep(operation.output, self.node("LpNormalization", [self.fp32(source)], axis=1, p=2), _FP32)
