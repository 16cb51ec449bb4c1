"""Float islands: subgraphs of a student without an integer form, between a dequantize and a quantize.

torch's exporter writes them, so this module needs no code for single operators that it supports.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import fx, nn

from qface.deployment.torch_onnx import torch_onnx_model
from qface.errors import UnsupportedLayerError, one_line
from qface.graph.aten import operator_name
from qface.graph.queries import SYMBOLIC_FUNCTIONS

__all__ = ["input_name", "island_module", "to_onnx_graph"]

_SIZE = torch.ops.aten.sym_size.int
_METHODS = frozenset(("expand", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "view"))
_FACTORIES: dict[str, Any] = {"arange": torch.arange, "full": torch.full, "ones": torch.ones, "zeros": torch.zeros}
"""Functions with sizes that may depend on the batch; torch's tracer sees that only in calls of the public functions."""


def island_module(
    student: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy ``nodes`` to a separate network.

    Args:
        student: network that contains the nodes; it is not changed.
        nodes: nodes of the island.
        outputs: nodes whose values the network returns, as a tuple.

    Returns:
        The network, and the outside nodes whose values are its inputs, in their order.
    """
    builder = _IslandBuilder(student, set(nodes), outputs)
    return builder.run(), builder.sources


class _IslandBuilder:
    def __init__(self, student: fx.GraphModule, nodes: set[fx.Node], outputs: Sequence[fx.Node]) -> None:
        self.student = student
        self.nodes = nodes
        self.outputs = outputs
        self.sources: list[fx.Node] = []
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._root = nn.Module()

    def run(self) -> fx.GraphModule:
        needed = self._needed()
        self.sources = [node for node in self.student.graph.nodes if node in needed and not self._is_inside(node)]
        for number, source in enumerate(self.sources):
            self._copies[source] = self._graph.placeholder(f"input_{number}")
        for node in self.student.graph.nodes:
            if node in needed and self._is_inside(node):
                self._copies[node] = self._copy(node)
        self._graph.output(tuple(self._copies[node] for node in self.outputs))
        return fx.GraphModule(self._root, self._graph, class_name="FloatIsland").eval()

    def _needed(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = list(self.outputs)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes if self._is_inside(node) else []
        return found

    def _is_inside(self, node: fx.Node) -> bool:
        """True for nodes of the island, and for sizes and constants, which each island computes for itself."""
        return node in self.nodes or node.op == "get_attr" or _is_number(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        args: Any = fx.node.map_arg(node.args, self._copies.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._copies.__getitem__)
        if node.op == "call_module":
            name = f"layer_{len(self._copies)}"
            self._root.add_module(name, copy.deepcopy(self.student.get_submodule(str(node.target))).cpu())
            return self._graph.call_module(name, args, kwargs)
        if node.op == "get_attr":
            name = f"constant_{len(self._copies)}"
            owner, _, attribute = str(node.target).rpartition(".")
            tensor = getattr(self.student.get_submodule(owner), attribute).detach().cpu()
            self._root.register_buffer(name, tensor)
            return self._graph.get_attr(name)
        if node.target is _SIZE:
            return self._graph.call_method("size", args)
        name = operator_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
        if name in _METHODS:
            return self._graph.call_method("reshape" if name == "view" else name, (args[0], *args[1:]), kwargs)
        if name in _FACTORIES:
            return self._graph.call_function(_FACTORIES[name], args, kwargs)
        if name == "slice":
            getitem: Any = operator.getitem
            return self._graph.call_function(getitem, (args[0], _index(*args[1:])))
        target: Any = node.target
        return self._graph.call_function(target, args, kwargs)


def _index(dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, slice(start, stop, step))


def _is_number(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target is _SIZE or node.target in SYMBOLIC_FUNCTIONS)


def input_name(number: int) -> str:
    """Return the name of an input of :func:`to_onnx_graph`, which omits unused inputs."""
    return f"input_{number}"


def to_onnx_graph(
    module: fx.GraphModule, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], name: str, opset: int
) -> onnx.GraphProto:
    """Export a float island to an ONNX graph.

    Args:
        module: network from :func:`island_module`.
        shapes: input shapes for a batch of two images.
        dtypes: input dtypes.
        name: name of the island, for error messages.
        opset: ONNX opset.

    Raises:
        UnsupportedLayerError: torch cannot export it.
    """
    inputs = tuple(torch.full(shape, 0.5).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    names = [input_name(number) for number in range(len(inputs))]
    outputs = [f"output_{number}" for number in range(_number_of_outputs(module))]
    try:
        return torch_onnx_model(module, inputs, names, outputs, opset).graph
    except Exception as error:  # torch's exporter may raise any type
        raise UnsupportedLayerError(
            f"torch cannot export {name!r} to ONNX ({one_line(error, 300)}); replace the operator it names"
        ) from error


def _number_of_outputs(module: fx.GraphModule) -> int:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    values: Any = output.args[0]
    return len(values)
