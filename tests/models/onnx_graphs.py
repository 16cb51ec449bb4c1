"""Small ONNX graphs for tests, written node by node as exporters other than torch's write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """Nodes and weights one after the other; each node reads what the one before it made.

    Args:
        opset: of all operators.
        shape: of the input ``data``.
        dtype: of its elements.
    """

    def __init__(
        self, opset: int = 13, shape: tuple[int | str, ...] = ("n", 3, 112, 112), dtype: int = TensorProto.FLOAT
    ) -> None:
        self.opset, self.shape, self.dtype = opset, shape, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = "data"
        self.rng = np.random.default_rng(0)

    def constant(self, *shape: int, value: object = None, name: str = "") -> str:
        """A constant of ``shape`` with random values, or ``value``; numbers become float32 or int64."""
        array = np.asarray(self.rng.normal(0, 0.3, shape) if value is None else value)
        array = array.astype(np.float32) if array.dtype.kind == "f" and array.dtype != np.float16 else array
        name = name or f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, after: str | None = None, **attributes: object) -> str:
        """Add a node that reads ``after``, by default what the last one made, and then ``inputs``."""
        names = [f"{op.lower()}{len(self.nodes)}_{number}" for number in range(outputs)]
        given = [self.last if after is None else after, *inputs]
        self.nodes.append(helper.make_node(op, given, names, name=f"/{names[0]}/x.1", **attributes))
        self.last = names[0]
        return names[0]

    def save(self, path: Path, metadata: dict[str, str] | None = None, outputs: tuple[str, ...] = ()) -> Path:
        """Write the file; its outputs are ``outputs``, by default what the last node made."""
        made = [helper.make_empty_tensor_value_info(name) for name in outputs or (self.last,)]
        for each in made:
            each.type.tensor_type.elem_type = TensorProto.FLOAT
        image = helper.make_tensor_value_info("data", self.dtype, self.shape)
        graph = helper.make_graph(self.nodes, "face", [image], made, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        helper.set_model_props(model, metadata or {})
        onnx.save(model, path)
        return path


def network(graph: Graph, size: tuple[int, int] = (112, 112), features: int = 6) -> None:
    """A small convolutional network with zero padding, from images [N, 3, *size] to [N, features]."""
    graph.add("Conv", graph.constant(8, 3, 3, 3, name="conv.weight"), strides=[4, 4], pads=[1, 1, 1, 1])
    graph.add("PRelu", graph.constant(8, 1, 1))
    graph.add("Flatten")
    matrix = graph.constant(features, 8 * -(-size[0] // 4) * -(-size[1] // 4), name="fc.weight")
    graph.add("Gemm", matrix, graph.constant(features), transB=1)
