"""Reading a float ONNX graph back as a torch network, since many face networks are published as ``.onnx`` only.

Each ONNX node becomes a layer or function of torch, on a torch.fx graph; the network can then be pruned, quantized and
saved as any other. Covered is what face networks are made of, IResNet and MobileFaceNet as InsightFace publishes them
and their like, in opsets 11 to 20. What is covered is checked: torch and onnxruntime must agree on the result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
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
from qface.models.layers import Add, Concat, Multiply
from qface.models.provenance import with_provenance, written_provenance
from qface.preprocessing import CROP_SIZE, Preprocessing, written_preprocessing

__all__ = ["load_onnx"]

_TOLERANCE = 1e-3
"""Greatest difference to onnxruntime, in parts of the embedding's length; the order of sums makes a hundredth of it."""

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger")

Array = npt.NDArray[Any]


def load_onnx(path: str | Path) -> tuple[nn.Module, Preprocessing]:
    """The network in an ONNX file, in eval mode, and what it reads: as a file of ours says, or as the graph shows.

    A file of ours also says which steps made the network.

    A subtraction and a scaling of the input at the start of the graph, as older InsightFace files have them, become
    part of the preprocessing.

    Raises:
        CheckpointError: the file is missing or damaged, or the network computes something else than the file.
        UnsupportedLayerError: the graph holds an operation that has no counterpart here; it is named.
    """
    path = Path(path)
    model = _read(path)
    found = _Import(model, path)
    network, likely = found.network()
    written = {entry.key: entry.value for entry in model.metadata_props}
    preprocessing = written_preprocessing(written["preprocessing"], path) if "preprocessing" in written else likely
    with_provenance(network, written_provenance(written.get("provenance", "[]"), path))
    network.eval()
    _check(network, preprocessing, path, reads_bytes=found.normalises)
    return network, preprocessing


def _read(path: Path) -> onnx.ModelProto:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own errors, which differ between its versions
        raise CheckpointError(f"{path} is no complete ONNX file ({one_line(error, 200)}); fetch it again") from error


@dataclass
class _Node:
    """An ONNX node, with its attributes as Python values."""

    op: str
    name: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, node: onnx.NodeProto) -> _Node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        return cls(node.op_type, node.name or node.output[0], list(node.input), node.output[0], attributes, node)


class _Import:
    """One graph on its way to torch."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        graph = model.graph
        self.path = path
        self.opsets = model.opset_import
        self.constants: dict[str, Array] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.origins: dict[str, str] = {}  # of constants made of others, the first of these
        self.nodes = [_Node.of(node) for node in graph.node]
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
        self.normalises = False  # reads bytes, and subtracts and scales by itself

    def network(self) -> tuple[fx.GraphModule, Preprocessing]:
        """The network, and what it reads."""
        quantized = [node.name for node in self.nodes if node.op in _QUANTIZED]
        if quantized:
            raise UnsupportedLayerError(
                f"{self.path} is quantized already (node {quantized[0]}); load the network it was made of"
            )
        self._take_normalisation()
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

    def _take_normalisation(self) -> None:
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
                self.mean, self.std, self.normalises = shift, 1 / factor, True
            else:
                break
            done.add(node.output)
        self.nodes = [node for node in self.nodes if node.output not in done]

    def _number_for(self, node: _Node) -> float | None:
        """What ``node`` subtracts from the image, multiplies it with or divides it by; None for any other node."""
        if node.op not in ("Sub", "Mul", "Div") or node.inputs[0] != self.image or node.inputs[1] not in self.constants:
            return None
        values = np.unique(self.constants[node.inputs[1]])
        usable = len(values) == 1 and (node.op == "Sub" or values[0] != 0)
        return float(values[0]) if usable else None

    def _is_constant(self, node: _Node) -> bool:
        return all(name in self.constants for name in node.inputs if name)

    def _add(self, node: _Node) -> None:
        if self._is_constant(node):
            self.constants[node.output] = self._constant(node)
        elif self._is_of_shapes(node):
            self.shapes.add(node.output)
        elif node.op not in _OPERATIONS:
            raise UnsupportedLayerError(self._unknown(node))
        else:
            value, rank = _OPERATIONS[node.op](self, node)
            self.values[node.output], self.ranks[node.output] = value, rank

    def _unknown(self, node: _Node) -> str:
        return (
            f"{self.path}: node {node.name} is a {node.op}, which cannot be imported; "
            f"known are {', '.join(sorted(_OPERATIONS))}"
        )

    def _constant(self, node: _Node) -> Array:
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

    def _is_of_shapes(self, node: _Node) -> bool:
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

    def weights(self, node: _Node, position: int) -> Tensor | None:
        """Input ``position`` of ``node`` as a float32 tensor; None where it is left out."""
        if len(node.inputs) <= position or not node.inputs[position]:
            return None
        name = node.inputs[position]
        if name not in self.constants:
            raise UnsupportedLayerError(f"{self.path}: {node.op} {node.name} computes its {name} as it runs")
        return torch.from_numpy(np.array(self.constants[name])).float()

    def required(self, node: _Node, position: int) -> Tensor:
        """Input ``position`` of ``node``, which it cannot do without."""
        found = self.weights(node, position)
        if found is None:
            raise CheckpointError(f"{self.path}: {node.op} {node.name} lacks input {position}; fetch it again")
        return found

    def call(self, node: _Node, layer: nn.Module, *inputs: str) -> fx.Node:
        """A call of ``layer``, named as in the file where that says something."""
        name = self._free_name(node)
        _place(self.root, name, layer)
        return self.graph.call_module(name, tuple(self.value(each) for each in inputs or node.inputs[:1]))

    def _free_name(self, node: _Node) -> str:
        weight = self.origins.get(node.inputs[1], node.inputs[1]) if len(node.inputs) > 1 else ""
        parts = weight.removesuffix(".weight").split(".") if weight.endswith(".weight") else [node.name.strip("/")]
        wanted = ".".join(re.sub(r"\W", "_", part) or "_" for part in parts)
        numbered = (wanted if number == 0 else f"{wanted}_{number}" for number in count())
        return next(name for name in numbered if _is_free(self.root, name))

    def refuse(self, node: _Node, what: str) -> UnsupportedLayerError:
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


# ---- operations: each adds nodes for one of ONNX's, and returns the value and its rank

Operation = Callable[[_Import, _Node], tuple[fx.Node, int]]


def _conv(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    weight, bias = run.required(node, 1), run.weights(node, 2)
    given = node.attributes
    if weight.ndim != 4:
        raise run.refuse(node, f"{weight.ndim - 2} dimensions")
    groups = given.get("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        tuple(given.get("strides", (1, 1))),
        _padding(run, node),
        tuple(given.get("dilations", (1, 1))),
        groups,
        bias is not None,
    )
    return run.call(node, _filled(layer, weight=weight, bias=bias)), 4


def _padding(run: _Import, node: _Node) -> tuple[int, int]:
    up, left, down, right = node.attributes.get("pads", (0, 0, 0, 0))
    if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise run.refuse(node, f"auto_pad {node.attributes['auto_pad'].decode()}")
    if (up, left) != (down, right):
        raise run.refuse(node, f"different padding on opposite sides, {up, left, down, right}")
    return up, left


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    layer.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, strict=False)
    return layer


def _batch_norm(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    if node.attributes.get("training_mode", 0):
        raise run.refuse(node, "training_mode")
    rank = run.rank(node.inputs[0])
    kind = nn.BatchNorm1d if rank == 2 else nn.BatchNorm2d
    weight, bias, mean, variance = (run.required(node, position) for position in range(1, 5))
    layer = kind(len(weight), eps=node.attributes.get("epsilon", 1e-5))
    return run.call(node, _filled(layer, weight=weight, bias=bias, running_mean=mean, running_var=variance)), rank


def _prelu(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    slopes = run.required(node, 1)
    if slopes.numel() != max(slopes.shape, default=1):
        raise run.refuse(node, f"slopes of shape {list(slopes.shape)}")
    return run.call(node, _filled(nn.PReLU(slopes.numel()), weight=slopes.flatten())), run.rank(node.inputs[0])


def _sum(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    if any(name in run.constants for name in node.inputs):
        return _shift(run, node)
    return run.call(node, Add(), *node.inputs), max(run.rank(name) for name in node.inputs)


def _shift(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    """A constant is the bias of the linear layer before it, which ``x @ W + b`` is written as."""
    tensor, constant = sorted(node.inputs, key=lambda name: name in run.constants)
    value = run.value(tensor)
    layer = run.root.get_submodule(str(value.target)) if value.op == "call_module" else None
    bias = run.required(node, node.inputs.index(constant)).flatten()
    fits = isinstance(layer, nn.Linear) and layer.bias is None and len(bias) == layer.out_features
    if not fits or value.users:
        raise run.refuse(node, f"a constant {constant} that is no bias")
    assert isinstance(layer, nn.Linear)
    layer.bias = nn.Parameter(bias)
    return value, 2


def _gemm(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    given = node.attributes
    if given.get("transA", 0):
        raise run.refuse(node, "transA")
    weight = run.required(node, 1) * given.get("alpha", 1.0)
    bias = run.weights(node, 2)
    return _linear(run, node, weight if given.get("transB", 0) else weight.T, bias, given.get("beta", 1.0))


def _matmul(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    return _linear(run, node, run.required(node, 1).T, None, 1.0)


def _linear(run: _Import, node: _Node, weight: Tensor, bias: Tensor | None, beta: float) -> tuple[fx.Node, int]:
    """A linear layer of ``weight`` [outputs, inputs]."""
    if run.rank(node.inputs[0]) != 2 or weight.ndim != 2:
        raise run.refuse(node, "an input that is no [N, features]")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    shift = None if bias is None else (beta * bias.flatten()).expand(weight.shape[0])
    return run.call(node, _filled(layer, weight=weight, bias=shift)), 2


def _flatten(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    if node.attributes.get("axis", 1) != 1:
        raise run.refuse(node, f"axis {node.attributes['axis']}")
    return run.call(node, nn.Flatten()), 2


def _reshape(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    """To rows; the check at the end finds out where sizes that are computed say something else."""
    if node.inputs[1] in run.constants:
        wanted = run.constants[node.inputs[1]].tolist()
        if len(wanted) != 2:
            raise run.refuse(node, f"the shape {wanted}")
    return run.call(node, nn.Flatten()), 2


def _require_height_and_width(run: _Import, node: _Node) -> None:
    """Refuse ``node`` unless its axes, an attribute or an input, are those of a map."""
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = run.constants.get(node.inputs[1], np.array([])).tolist()
    if run.rank(node.inputs[0]) != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise run.refuse(node, f"the axes {axes}")


def _squeeze(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    _require_height_and_width(run, node)
    return run.call(node, nn.Flatten()), 2


def _pool(kind: type[nn.MaxPool2d] | type[nn.AvgPool2d]) -> Operation:
    def add(run: _Import, node: _Node) -> tuple[fx.Node, int]:
        given = node.attributes
        if set(given.get("dilations", (1, 1))) != {1}:
            raise run.refuse(node, f"dilations {given['dilations']}")
        kernel, stride = tuple(given["kernel_shape"]), tuple(given.get("strides", (1, 1)))
        more = {} if kind is nn.MaxPool2d else {"count_include_pad": bool(given.get("count_include_pad", 0))}
        layer = kind(kernel, stride, _padding(run, node), ceil_mode=bool(given.get("ceil_mode", 0)), **more)
        return run.call(node, layer), 4

    return add


def _clip(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    low, high = (
        node.attributes.get(name) if name in node.attributes else _item(run.weights(node, position))
        for position, name in ((1, "min"), (2, "max"))
    )
    if low == 0 and high in (None, 6.0):
        return run.call(node, nn.ReLU() if high is None else nn.ReLU6()), run.rank(node.inputs[0])
    if low is None or high is None:
        raise run.refuse(node, f"the limits {low} and {high}")
    return run.call(node, nn.Hardtanh(low, high)), run.rank(node.inputs[0])


def _item(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _same_shape(make: Callable[[_Node], nn.Module]) -> Operation:
    """An operation that is a layer of torch, and keeps the rank."""
    return lambda run, node: (run.call(node, make(node)), run.rank(node.inputs[0]))


def _mean(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    _require_height_and_width(run, node)
    pooled = run.call(node, nn.AdaptiveAvgPool2d(1))
    if node.attributes.get("keepdims", 1):
        return pooled, 4
    run.values[node.output] = pooled
    return run.call(node, nn.Flatten(), node.output), 2


def _concat(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    rank = run.rank(node.inputs[0])
    return run.call(node, Concat(node.attributes["axis"] % rank), *node.inputs), rank


def _product(run: _Import, node: _Node) -> tuple[fx.Node, int]:
    if any(name in run.constants for name in node.inputs):
        raise run.refuse(node, "a constant factor")
    return run.call(node, Multiply(), *node.inputs), max(run.rank(name) for name in node.inputs)


_OPERATIONS: dict[str, Operation] = {
    "Add": _sum,
    "AveragePool": _pool(nn.AvgPool2d),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Dropout": _same_shape(lambda node: nn.Identity()),
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _same_shape(lambda node: nn.AdaptiveAvgPool2d(1)),
    "HardSwish": _same_shape(lambda node: nn.Hardswish()),
    "Identity": _same_shape(lambda node: nn.Identity()),
    "LeakyRelu": _same_shape(lambda node: nn.LeakyReLU(node.attributes.get("alpha", 0.01))),
    "MatMul": _matmul,
    "MaxPool": _pool(nn.MaxPool2d),
    "Mul": _product,
    "PRelu": _prelu,
    "ReduceMean": _mean,
    "Relu": _same_shape(lambda node: nn.ReLU()),
    "Reshape": _reshape,
    "Sigmoid": _same_shape(lambda node: nn.Sigmoid()),
    "Squeeze": _squeeze,
}


def _check(network: nn.Module, preprocessing: Preprocessing, path: Path, reads_bytes: bool) -> None:
    """Compare with onnxruntime on random images.

    Raises:
        CheckpointError: the two differ.
    """
    onnxruntime: Any = import_module("onnxruntime")  # it has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    pixels = torch.randint(0, 256, (1, 3, *preprocessing.size), generator=torch.Generator().manual_seed(0)).float()
    mean, std = preprocessing.mean[0], preprocessing.std[0]
    normalised = (pixels - mean) / std
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = pixels if reads_bytes else normalised
        (expected,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    except Exception as error:  # onnxruntime's errors have no common base
        raise CheckpointError(f"onnxruntime cannot run {path}: {one_line(error, 200)}") from error
    try:
        with torch.no_grad():
            found = network(normalised)
    except RuntimeError as error:  # torch's own
        raise CheckpointError(
            f"{path} was not understood: torch cannot run it ({one_line(error, 200)}); please report its graph"
        ) from error
    difference = float((found - torch.from_numpy(expected)).abs().max()) if found.shape == expected.shape else np.inf
    if not difference <= _TOLERANCE * float(np.linalg.norm(expected)):
        raise CheckpointError(
            f"{path} was not understood: torch makes {list(found.shape)} of an image and onnxruntime "
            f"{list(expected.shape)}, {difference:.3g} apart; please report its graph"
        )
