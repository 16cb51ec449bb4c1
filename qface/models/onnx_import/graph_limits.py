"""Resource checks of an ONNX graph before it runs, since runtimes have no limits of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from qface.errors import CheckpointError, LimitError
from qface.limits import Allowance, check

__all__ = ["all_nodes", "check_external_data", "check_functions", "check_graph"]

_ENDLESS = frozenset({"Loop", "Scan", "SequenceMap"})
"""Operators that may run forever."""
_FEW = 1024  # maximum elements of a constant that can be a shape
_LONGEST_LIST = 2**16  # elements
_ON_LISTS = frozenset("Add Cast Concat Gather Identity Mul Size Slice Squeeze Sub Unsqueeze".split())
"""Operators whose results on lists of integers, which may be shapes, ONNX's shape inference computes."""
_MOST_PER_BYTE = 4  # numbers of two bits
_OPEN = 112  # assumed height and width if the file has dynamic ones


def check_graph(model: onnx.ModelProto, path: str | Path) -> None:
    """Check a graph's operators, image size, multiplications and memory against the limits.

    Sizes come from ONNX's shape inference for one image; sizes that depend on pixel values are not checked.

    Raises:
        CheckpointError: a constant declares more numbers than it stores.
        LimitError: the graph exceeds a limit of :mod:`qface.limits` or contains a loop.
    """
    check_functions(model, path)
    _check_constants(model.graph, path)
    check("operators", sum(1 for _ in all_nodes(model.graph.node)), f"{path}")
    for body in (model.graph.node, *(function.node for function in model.functions)):
        loop = next((node for node in all_nodes(body) if node.op_type in _ENDLESS), None)
        if loop is not None:
            raise LimitError(
                f"{path}: {loop.op_type} {loop.name or loop.output[:1]} is a loop, which is not supported; "
                "export the network without loops"
            )
    for image in _images(model.graph):
        sides = _sides(image)
        if len(sides) == 4:
            check("image", math.prod(sides[1:]) / min(3, *sides[1:]), f"{path}, with the input {sides},")
            check("bytes", 4 * math.prod(sides), f"{path}, with the input {sides},")
    _check_sizes(model, path)


def _check_constants(graph: onnx.GraphProto, path: str | Path) -> None:
    """Check that constants store about the numbers that they declare; types and exact sizes are the runtime's."""
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            continue
        typed = (tensor.float_data, tensor.double_data, tensor.int64_data, tensor.uint64_data, tensor.string_data)
        stored = _MOST_PER_BYTE * (len(tensor.raw_data) + 4 * len(tensor.int32_data)) + sum(map(len, typed))
        if math.prod(tensor.dims) > stored:
            raise CheckpointError(
                f"{path} is damaged: {tensor.name} declares {list(tensor.dims)} numbers and stores fewer; get it again"
            )


def all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield ``nodes`` and all nodes in their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def check_functions(model: onnx.ModelProto, path: str | Path) -> None:
    """Check the number of operators after inlining of functions, which can grow exponentially.

    Raises:
        CheckpointError: a function calls itself.
        LimitError: there are too many operators.
    """
    bodies = {(function.domain, function.name): function.node for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(key: tuple[str, str], callers: tuple[tuple[str, str], ...]) -> int:
        if key not in bodies:
            return 1
        if key in callers:
            raise CheckpointError(f"{path} is damaged: the function {key[1]} calls itself; export it again")
        check("depth", len(callers), f"{path}, in its functions,")
        if key not in sizes:
            calls = [(node.domain, node.op_type) for node in all_nodes(bodies[key])]
            sizes[key] = sum(size_of(call, (*callers, key)) for call in calls)
        return sizes[key]

    total = sum(size_of((node.domain, node.op_type), ()) for node in all_nodes(model.graph.node))
    check("operators", total, f"{path}, with its functions,")


def check_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Check that constants reference no more bytes of external files than these have.

    Raises:
        LimitError: the same bytes are referenced again and again.
    """
    tensors = [each for each in model.graph.initializer if uses_external_data(each)]
    infos = [ExternalDataInfo(each) for each in tensors]
    files = {info.location: _length(path.parent / info.location) for info in infos}
    allowance = Allowance(f"{path}, in its external data,", sum(files.values()))
    for info in infos:
        allowance.spend(info.length or files[info.location])


def _length(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _images(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    constants = {each.name for each in graph.initializer}
    return [each for each in graph.input if each.name not in constants]


def _sides(value: onnx.ValueInfoProto) -> list[int]:
    """Return the shape of an input; dynamic sizes become one image of 112x112."""
    dims = value.type.tensor_type.shape.dim
    return [each.dim_value or (_OPEN if number > 1 else 1) for number, each in enumerate(dims)]


def _check_sizes(model: onnx.ModelProto, path: str | Path) -> None:
    try:
        inferred = onnx.shape_inference.infer_shapes(_light(model), data_prop=_is_propagable(model.graph))
    except Exception:  # an inconsistent graph, for which the runtime or the importer has a better error
        return
    count = max((_sides(image)[0] for image in _images(model.graph) if _sides(image)), default=1)
    constant = _constants(model.graph)
    shapes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in inferred.graph.input}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sizes = shapes[value.name] = [each.dim_value for each in value.type.tensor_type.shape.dim]
        size, what = 4 * math.prod(map(float, sizes)), f"{path}, in the value {value.name} {sizes},"
        check("bytes", size, what)
        if value.name not in constant:
            check("activations", size / count, what)
    _check_products(model.graph, constant, shapes, path)


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Return the names of tensors that do not depend on the images."""
    names = {"", *(each.name for each in graph.initializer)}
    for node in graph.node:
        if names.issuperset(node.input):
            names.update(node.output)
    return names


def _is_propagable(graph: onnx.GraphProto) -> bool:
    """False if nodes compute with long lists, since shape inference would keep an object for each number of them."""
    lengths = {each.name: math.prod(each.dims) for each in graph.initializer}
    lists = {each.name: each.dims[0] for each in graph.initializer if len(each.dims) == 1}
    for node in graph.node:
        inputs = [lengths.get(name, _FEW) for name in node.input]
        length = sum(inputs) if node.op_type == "Concat" else max(inputs, default=_FEW)
        lengths.update(dict.fromkeys(node.output, length))
        if node.op_type == "Concat" and length > _LONGEST_LIST:
            return False
        if node.op_type in _ON_LISTS and any(lists.get(name, 0) > _LONGEST_LIST for name in node.input):
            return False
    return True


def _check_products(graph: onnx.GraphProto, constant: set[str], shapes: dict[str, list[int]], path: str | Path) -> None:
    """Check the multiplications of constant matrix products; integer ones take a runtime seconds."""
    shapes = shapes | {each.name: list(each.dims) for each in graph.initializer}
    total = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and constant.issuperset(node.input):
            left, made = (shapes.get(name) or [1] for name in (node.input[0], node.output[0]))
            total += math.prod(map(float, made)) * max(left)
            check("multiplications", total, f"{path}, at {node.op_type} {node.name},")


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the graph without large constants, which become inputs of the same shape, to save memory."""
    graph = onnx.GraphProto(name="graph", node=model.graph.node, input=model.graph.input, output=model.graph.output)
    for image in _images(model.graph):
        found = next(each for each in graph.input if each.name == image.name)
        for dim, side in zip(found.type.tensor_type.shape.dim, _sides(image), strict=True):
            dim.dim_value = side
    names = {each.name for each in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= _FEW:
            graph.initializer.append(tensor)
        elif tensor.name not in names:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return onnx.ModelProto(
        ir_version=max(4, model.ir_version), graph=graph, opset_import=model.opset_import, functions=model.functions
    )
