"""The walk over an ONNX graph: constants are computed, and each other node becomes a call on a torch.fx graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from qface.errors import CheckpointError, UnsupportedLayerError, one_line
from qface.preprocessing import CROP_SIZE, Preprocessing

__all__ = ["GraphImport", "Node", "Operator"]

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger")

Array = npt.NDArray[Any]


@dataclass
class Node:
    """An ONNX node, with its attributes as Python values."""

    op: str
    name: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Node:
        """``node``, called like its output where it has no name."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        return cls(node.op_type, node.name or node.output[0], list(node.input), node.output[0], attributes, node)


class GraphImport:
    """One graph on its way to torch.

    Args:
        model: of the file.
        path: the file, for messages.
        operators: what can be imported, by the name of the operator.
    """

    def __init__(self, model: onnx.ModelProto, path: Path, operators: Mapping[str, Operator]) -> None:
        graph = model.graph
        self.path = path
        self.operators = operators
        self.opsets = model.opset_import
        self.constants: dict[str, Array] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.origins: dict[str, str] = {}  # of constants made of others, the first of these
        self.nodes = [Node.of(node) for node in graph.node]
        images = [each for each in graph.input if each.name not in self.constants]
        if len(images) != 1 or len(graph.output) != 1:
            raise CheckpointError(
                f"{path} has {len(images)} inputs and {len(graph.output)} outputs; a face network has one of each"
            )
        self.image, self.output = images[0].name, graph.output[0].name
        self.size = _size(images[0], path)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.ranks: dict[str, int] = {}
        self.shapes: set[str] = set()  # values computed from shapes alone
        self.mean, self.std = 127.5, 127.5
        self.normalizes = False  # reads bytes, and subtracts and scales by itself

    def network(self) -> tuple[fx.GraphModule, Preprocessing]:
        """The network, and what it reads."""
        quantized = [node.name for node in self.nodes if node.op in _QUANTIZED]
        if quantized:
            raise UnsupportedLayerError(
                f"{self.path} is quantized already (node {quantized[0]}); load the network it was made of"
            )
        self._take_normalization()
        self.values[self.image] = self.graph.placeholder("x")
        self.ranks[self.image] = 4
        for node in self.nodes:
            self._add(node)
        if self.output not in self.values:
            raise CheckpointError(f"{self.path}: nothing makes its output {self.output}; fetch it again")
        self.graph.output(self.values[self.output])
        network = fx.GraphModule(self.root, self.graph, class_name="ImportedNetwork")
        network.graph.eliminate_dead_code()
        network.recompile()
        return network, Preprocessing(size=self.size, mean=(self.mean,) * 3, std=(self.std,) * 3)

    def _take_normalization(self) -> None:
        """Let the preprocessing do what a subtraction and a scaling by one number do to the image."""
        shift, factor, done = 0.0, 1.0, set()
        for node in self.nodes:
            if self._is_constant(node):
                self.constants[node.output] = self._constant(node)
            elif (number := self._number_for(node)) is not None:
                if node.op == "Sub":
                    shift += number / factor
                else:
                    factor *= number if node.op == "Mul" else 1 / number
                self.image = node.output
                self.mean, self.std, self.normalizes = shift, 1 / factor, True
            else:
                break
            done.add(node.output)
        self.nodes = [node for node in self.nodes if node.output not in done]

    def _number_for(self, node: Node) -> float | None:
        """What ``node`` subtracts from the image, multiplies it with or divides it by; None for any other node."""
        if node.op not in ("Sub", "Mul", "Div") or node.inputs[0] != self.image or node.inputs[1] not in self.constants:
            return None
        values = np.unique(self.constants[node.inputs[1]])
        usable = len(values) == 1 and (node.op == "Sub" or values[0] != 0)
        return float(values[0]) if usable else None

    def _is_constant(self, node: Node) -> bool:
        return all(name in self.constants for name in node.inputs if name)

    def _add(self, node: Node) -> None:
        if self._is_constant(node):
            self.constants[node.output] = self._constant(node)
        elif self._is_of_shapes(node):
            self.shapes.add(node.output)
        elif node.op not in self.operators:
            raise UnsupportedLayerError(self._unknown(node))
        else:
            value, rank = self.operators[node.op](self, node)
            self.values[node.output], self.ranks[node.output] = value, rank

    def _unknown(self, node: Node) -> str:
        return (
            f"{self.path}: node {node.name} is a {node.op}, which cannot be imported; "
            f"known are {', '.join(sorted(self.operators))}"
        )

    def _constant(self, node: Node) -> Array:
        """What ``node`` makes of constants."""
        if node.inputs:
            self.origins[node.output] = self.origins.get(node.inputs[0], node.inputs[0])
        if node.op == "Identity":
            return self.constants[node.inputs[0]]
        given = {name: self.constants[name] for name in node.inputs if name}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
            for name, value in given.items()
        ]
        output = helper.make_empty_tensor_value_info(node.output)
        model = helper.make_model(
            helper.make_graph([node.proto], "constant", inputs, [output]), opset_imports=self.opsets
        )
        try:
            (value,) = ReferenceEvaluator(model).run([node.output], given)
        except Exception as error:  # of whatever kind the node's own implementation raises
            raise UnsupportedLayerError(
                f"{self.path}: the constant {node.name} ({node.op}) cannot be computed: {one_line(error, 200)}"
            ) from error
        return np.asarray(value)

    def _is_of_shapes(self, node: Node) -> bool:
        """Whether ``node`` computes with sizes, as exporters write ``x.view(x.size(0), -1)``."""
        if node.op == "Shape":
            return True
        known = [name in self.shapes or name in self.constants for name in node.inputs if name]
        return bool(known) and all(known) and any(name in self.shapes for name in node.inputs)

    # ---- what operations use

    def value(self, name: str) -> fx.Node:
        """The tensor ``name``."""
        if name not in self.values:
            raise UnsupportedLayerError(f"{self.path}: {name} is a constant or unknown where a tensor is needed")
        return self.values[name]

    def rank(self, name: str) -> int:
        """How many dimensions the tensor ``name`` has."""
        self.value(name)
        return self.ranks[name]

    def weights(self, node: Node, position: int) -> Tensor | None:
        """Input ``position`` of ``node`` as a float32 tensor; None where it is left out."""
        if len(node.inputs) <= position or not node.inputs[position]:
            return None
        name = node.inputs[position]
        if name not in self.constants:
            raise UnsupportedLayerError(f"{self.path}: {node.op} {node.name} computes its {name} as it runs")
        return torch.from_numpy(np.array(self.constants[name])).float()

    def required(self, node: Node, position: int) -> Tensor:
        """Input ``position`` of ``node``, which it cannot do without."""
        found = self.weights(node, position)
        if found is None:
            raise CheckpointError(f"{self.path}: {node.op} {node.name} lacks input {position}; fetch it again")
        return found

    def call(self, node: Node, layer: nn.Module, *inputs: str) -> fx.Node:
        """A call of ``layer``, named as in the file where that says something."""
        name = self._free_name(node)
        _place(self.root, name, layer)
        return self.graph.call_module(name, tuple(self.value(each) for each in inputs or node.inputs[:1]))

    def _free_name(self, node: Node) -> str:
        weight = self.origins.get(node.inputs[1], node.inputs[1]) if len(node.inputs) > 1 else ""
        parts = weight.removesuffix(".weight").split(".") if weight.endswith(".weight") else [node.name.strip("/")]
        wanted = ".".join(re.sub(r"\W", "_", part) or "_" for part in parts)
        numbered = (wanted if number == 0 else f"{wanted}_{number}" for number in count())
        return next(name for name in numbered if _is_free(self.root, name))

    def refuse(self, node: Node, what: str) -> UnsupportedLayerError:
        """The error for a node that is known, used in a way that is not."""
        return UnsupportedLayerError(f"{self.path}: {node.op} {node.name} has {what}, which cannot be imported")


def _size(image: onnx.ValueInfoProto, path: Path) -> tuple[int, int]:
    """Height and width of the input; those of a crop where the file leaves them open."""
    dimensions = [each.dim_value for each in image.type.tensor_type.shape.dim]
    if len(dimensions) != 4 or dimensions[1] not in (0, 3):
        raise CheckpointError(f"{path} reads {dimensions}, and no images [N, 3, height, width]")
    return dimensions[2] or CROP_SIZE, dimensions[3] or CROP_SIZE


def _is_free(root: nn.Module, name: str) -> bool:
    """Whether a layer can be put at ``name``: nothing is there, and no layer on the way."""
    at = root
    for part in name.split("."):
        if not hasattr(at, part):
            return type(at) is nn.Module  # a folder of layers, and no layer
        at = getattr(at, part)
    return False


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    *folders, last = name.split(".")
    for part in folders:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, layer)


Operator = Callable[[GraphImport, Node], tuple[fx.Node, int]]
"""Adds nodes for one of ONNX's; returns the value and its rank."""
