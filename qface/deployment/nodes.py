"""Base of the ONNX writers: nodes, initializers and the model around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qface.deployment import integer_graph as ir
from qface.deployment.float_islands import input_name, to_onnx_graph
from qface.deployment.weight_formats import WeightFormat

__all__ = ["IR_VERSION", "OPSET", "Direct", "NodeCollector", "along_channels", "assemble", "convolution", "window"]

OPSET = 18
IR_VERSION = 9  # the default of onnx is too new for some runtimes


_KEPT_IN_FLOAT = frozenset(("Conv", "ConvTranspose", "Gemm", "Softmax"))
"""Operators that onnxruntime would not compute in float between a dequantize and a quantize.

It quantizes their weights itself, and its integer Softmax rounds a sixth of all values differently. A Max without
effect before them hides the dequantize.
"""
_CONVERTING = frozenset(("Cast", "DequantizeLinear", "QuantizeLinear"))
"""Operators between two layers; more than half of all nodes."""
_MOVING = frozenset(("Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"))

Direct = ir.SigmoidOp | ir.MaxOp | ir.MultiplyOp | ir.ConcatOp | ir.GlobalAveragePoolOp | ir.AveragePoolOp
"""Operations that are a single node for any dtype."""
_MULTIPLYING = (ir.ConvolutionOp, ir.LinearOp)


class NodeCollector:
    """Nodes and initializers of a model, in order.

    Initializers and nodes are named after their layers. Intermediate tensors get numbers, because names would take 8 %
    of a small network's file. Casts, quantizers and nodes that compute constants have no name; their names would take
    2 %.

    Args:
        number: float type of the computation.

    Attributes:
        layer: name of the layer of the next nodes.
    """

    def __init__(self, number: type[np.floating[Any]] = np.float32) -> None:
        self.number = number
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: set[str] = set()
        self._numbered = 0
        self.layer = ""
        self._names: Counter[str] = Counter()

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output, by default a number."""
        if output is None:
            self._numbered += 1
            output = str(self._numbered)
        self.nodes.append(helper.make_node(kind, inputs, [output], self._node_name(kind, inputs), **attributes))
        return output

    def _node_name(self, kind: str, inputs: Sequence[str]) -> str:
        """Return ``layer/kind``, ``layer/kind_2`` and so on, or "" for nodes that need no name."""
        if kind in _CONVERTING or self._constants.issuperset(inputs):
            return ""
        name = f"{self.layer}/{kind}"
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add the initializer ``name`` unless it exists, and return the name."""
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    # ---- images

    def pixels(self, operation: ir.Uint8InputOp | ir.NormalizeUint8Op) -> str:
        """Return the uint8 image [N, 3, height, width] in the channel order of the operation."""
        (images,) = operation.inputs
        if operation.channels == tuple(range(len(operation.channels))):
            return images.name
        return self.node("Gather", [images.name, self.constant("channels", np.array(operation.channels))], axis=1)

    def normalized(self, operation: ir.NormalizeUint8Op, pixels: str) -> str:
        """Normalize the float32 ``pixels``."""
        mean = self.constant("image_mean", along_channels(operation.mean, rank=4))
        std = self.constant("image_std", along_channels(operation.std, rank=4))
        return self.node("Div", [self.node("Sub", [pixels, mean]), std])

    def shifted(self, operation: ir.QuantizeImageOp, images: str) -> str:
        """Subtract the offset from the float32 ``images``."""
        if not operation.offset:
            return images
        return self.node("Sub", [images, self.constant("image_offset", np.float32(operation.offset))])

    # ---- operations on any type, and float islands

    def moved(self, operation: ir.MoveOp, inputs: Sequence[str], output: str | None = None) -> str:
        """Append the node of ``operation``; equal operands share an initializer."""
        operands = ["" if each is None else self.constant(_operand_name(each), each) for each in operation.operands]
        return self.node(operation.operator, [*inputs, *operands], output, **operation.attributes)

    def padded(self, operation: ir.PadOp, x: str, zero: str, output: str | None = None) -> str:
        """Pad ``x``; ``zero`` is the name of its zero point, "" for floats."""
        pads = np.array(operation.pads)
        inputs = [x, self.constant(_operand_name(pads), pads)]
        if operation.mode == "constant" and zero:
            inputs.append(zero)
        return self.node("Pad", inputs, output, mode=operation.mode)

    def island(
        self, operation: ir.FloatIslandOp, inputs: Sequence[str], outputs: Sequence[str] | None = None
    ) -> list[str]:
        """Append the nodes of a float island with float32 inputs; return the names of its outputs."""
        graph = to_onnx_graph(operation.module, operation.shapes, operation.dtypes, operation.name, OPSET)
        prefix = f"{operation.name}:"
        names = {"": ""} | {input_name(number): name for number, name in enumerate(inputs)}
        for tensor in graph.initializer:
            names[tensor.name] = self._initializer(f"{prefix}{tensor.name}", tensor)
        made = list(outputs) if outputs is not None else [f"{prefix}{each.name}" for each in graph.output]
        names |= dict(zip((each.name for each in graph.output), made, strict=True))
        moved = {each.name for each in graph.input}
        for node in graph.node:
            if node.op_type in _MOVING and node.input[0] in moved:
                moved.update(node.output)
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name = self._node_name(node.op_type, node.input)
            for name in node.output:
                if name not in names:
                    self._numbered += 1
                    names[name] = str(self._numbered)
            copied.input[:] = [names[name] for name in node.input]
            if node.op_type in _KEPT_IN_FLOAT and node.input[0] in moved:
                lowest = self.constant("lowest", np.finfo(np.float32).min)
                copied.input[0] = self.node("Max", [copied.input[0], lowest])
            copied.output[:] = [names[name] for name in node.output]
            self.nodes.append(copied)
        return made

    def _initializer(self, name: str, tensor: onnx.TensorProto) -> str:
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)
        copied.name = name
        self.initializers.append(copied)
        return name

    # ---- operations on floats

    def direct(self, operation: Direct, inputs: Sequence[str]) -> str:
        """Append the node of ``operation``."""
        if isinstance(operation, ir.ConcatOp):
            return self.node("Concat", inputs, axis=operation.axis)
        if isinstance(operation, ir.AveragePoolOp):
            count_include_pad = int(operation.count_include_pad)
            return self.node("AveragePool", inputs, **window(operation), count_include_pad=count_include_pad)
        return self.node("Mul" if isinstance(operation, ir.MultiplyOp) else operation.kind, inputs)

    def clamped(self, x: str, clamp: ir.Clamp | None) -> str:
        """Clamp ``x``; return it unchanged if ``clamp`` is None."""
        if clamp is None:
            return x
        if clamp == (0.0, None):
            return self.node("Relu", [x])
        limits = ["" if limit is None else self.constant(f"limit_{limit:g}", self.number(limit)) for limit in clamp]
        return self.node("Clip", [x, *limits])


def assemble(
    graph: ir.IntegerGraph,
    weights: WeightFormat,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """Build the ONNX model from its nodes.

    The input is ``images`` [batch, 3, height, width], float32 or uint8; the output ``embedding`` [batch, D], float32.

    Args:
        graph: source of the input type, the embedding dimension and the preprocessing.
        weights: storage of the weights of ``nodes``.
        nodes: nodes from ``images`` to ``embedding``.
        initializers: initializers of ``nodes``, without the weights.
        metadata: entries to add to the preprocessing in the model's metadata.
    """
    tensors, unpacking = weights.contents()
    height, width = graph.preprocessing.size
    image_type = TensorProto.FLOAT if graph.images.qparams is None else TensorProto.UINT8
    body = helper.make_graph(
        [*unpacking, *nodes],
        "qface",
        [helper.make_tensor_value_info("images", image_type, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", graph.dimensions])],
        [*tensors, *initializers],
        doc_string=f"Embeddings of {graph.dimensions} numbers of faces [batch, 3, {height}, {width}]",
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="qface")
    helper.set_model_props(model, {"preprocessing": graph.preprocessing.to_json(), **metadata})
    _add_shapes(model, {each.output.name for each in graph.operations if isinstance(each, _MULTIPLYING)})
    return model


def _add_shapes(model: onnx.ModelProto, values: set[str]) -> None:
    """Add the inferred shapes of ``values``; those of all values would make the file too large."""
    inferred = [each for each in onnx.shape_inference.infer_shapes(model).graph.value_info if each.name in values]
    for dimension in (each for value in inferred for each in value.type.tensor_type.shape.dim):
        if dimension.dim_param.startswith("unk__"):  # onnx's name for an unknown dimension
            dimension.ClearField("dim_param")
    model.graph.value_info.extend(inferred)


def _operand_name(values: npt.NDArray[Any]) -> str:
    return "_".join(map(str, ("operand", values.dtype, *values.flatten().tolist())))


def along_channels(values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    """Reshape ``values`` [channels] to broadcast along dimension 1 of a tensor of ``rank`` dimensions."""
    return values.reshape(-1, *(1,) * (rank - 2))


def convolution(operation: ir.ConvolutionOp) -> dict[str, Any]:
    """Return the attributes of a Conv node."""
    top, left = operation.padding
    return {
        "kernel_shape": operation.weight.integers.shape[2:],
        "strides": operation.stride,
        "pads": [top, left, top, left],
        "dilations": operation.dilation,
        "group": operation.groups,
    }


def window(operation: ir.AveragePoolOp | ir.MaxPoolOp) -> dict[str, Any]:
    """Return the attributes of a pooling node."""
    top, left = operation.padding
    return {
        "kernel_shape": operation.kernel,
        "strides": operation.stride,
        "pads": [top, left, top, left],
        "ceil_mode": int(operation.ceil_mode),
    }
