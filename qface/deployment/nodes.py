"""What writers of ONNX models share: collecting nodes and constants, and the frame around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qface.deployment import graph as ir
from qface.deployment.containers import WeightContainer

__all__ = ["IR_VERSION", "OPSET", "NodeCollector", "along_channels", "assemble", "convolution", "window"]

OPSET = 18
IR_VERSION = 9  # onnx's own default is newer than what some runtimes read


class NodeCollector:
    """Nodes and initializers in the order in which they come.

    Constants are called after their layers; what lies between two values gets a number, because names would take a
    twelfth of a small network's file.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: set[str] = set()
        self._numbered = 0

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output, a number unless it is given."""
        if output is None:
            self._numbered += 1
            output = str(self._numbered)
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Provide ``value`` under ``name``, once, and return the name."""
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def reordered(self, pixels: str, channels: ir.Channels) -> str:
        """``pixels`` [N, 3, height, width] with each of ``channels`` in its place."""
        if channels == tuple(range(len(channels))):
            return pixels
        return self.node("Gather", [pixels, self.constant("channels", np.array(channels))], axis=1)


def assemble(
    graph: ir.IntegerGraph,
    weights: WeightContainer,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """The model of ``graph``, from ``images`` [batch, 3, height, width] to ``embedding`` [batch, D].

    Images are float32, or uint8 where they lie on a grid; embeddings are float32.

    Args:
        graph: for the interface and the preprocessing.
        weights: that ``nodes`` read.
        nodes: that make ``embedding`` of ``images``.
        initializers: that they read besides.
        metadata: written into the model beside the preprocessing.
    """
    tensors, unpacking = weights.contents()
    height, width = graph.preprocessing.size
    image_type = TensorProto.FLOAT if graph.images.grid is None else TensorProto.UINT8
    body = helper.make_graph(
        [*unpacking, *nodes],
        "qface",
        [helper.make_tensor_value_info("images", image_type, ["batch", 3, height, width])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", graph.dimensions])],
        [*tensors, *initializers],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="qface")
    helper.set_model_props(model, {"preprocessing": graph.preprocessing.to_json(), **metadata})
    return model


def along_channels(values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    """``values`` [channels] in a shape that broadcasts along dimension 1 of ``rank``."""
    return values.reshape(-1, *(1,) * (rank - 2))


def convolution(operation: ir.Convolution) -> dict[str, Any]:
    """Attributes of a Conv node."""
    top, left = operation.padding
    return {
        "kernel_shape": operation.weight.integers.shape[2:],
        "strides": operation.stride,
        "pads": [top, left, top, left],
        "dilations": operation.dilation,
        "group": operation.groups,
    }


def window(operation: ir.AveragePool | ir.MaxPool) -> dict[str, Any]:
    """Attributes of a pooling node."""
    top, left = operation.padding
    return {
        "kernel_shape": operation.kernel,
        "strides": operation.stride,
        "pads": [top, left, top, left],
        "ceil_mode": int(operation.ceil_mode),
    }
