"""The operators of ONNX that can be imported, each as a layer of torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, fx, nn

from qface.graph.layers import Add, Concat, Multiply
from qface.models.onnx_import.graph_import import GraphImport, Node, Operator

__all__ = ["OPERATORS"]


def _conv(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
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


def _padding(run: GraphImport, node: Node) -> tuple[int, int]:
    up, left, down, right = node.attributes.get("pads", (0, 0, 0, 0))
    if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise run.refuse(node, f"auto_pad {node.attributes['auto_pad'].decode()}")
    if (up, left) != (down, right):
        raise run.refuse(node, f"different padding on opposite sides, {up, left, down, right}")
    return up, left


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    layer.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, strict=False)
    return layer


def _batch_norm(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    if node.attributes.get("training_mode", 0):
        raise run.refuse(node, "training_mode")
    rank = run.rank(node.inputs[0])
    kind = nn.BatchNorm1d if rank == 2 else nn.BatchNorm2d
    weight, bias, mean, variance = (run.required(node, position) for position in range(1, 5))
    layer = kind(len(weight), eps=node.attributes.get("epsilon", 1e-5))
    return run.call(node, _filled(layer, weight=weight, bias=bias, running_mean=mean, running_var=variance)), rank


def _prelu(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    slopes = run.required(node, 1)
    if slopes.numel() != max(slopes.shape, default=1):
        raise run.refuse(node, f"slopes of shape {list(slopes.shape)}")
    return run.call(node, _filled(nn.PReLU(slopes.numel()), weight=slopes.flatten())), run.rank(node.inputs[0])


def _sum(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    if any(name in run.constants for name in node.inputs):
        return _shift(run, node)
    return run.call(node, Add(), *node.inputs), max(run.rank(name) for name in node.inputs)


def _shift(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
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


def _gemm(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    given = node.attributes
    if given.get("transA", 0):
        raise run.refuse(node, "transA")
    weight = run.required(node, 1) * given.get("alpha", 1.0)
    bias = run.weights(node, 2)
    return _linear(run, node, weight if given.get("transB", 0) else weight.T, bias, given.get("beta", 1.0))


def _matmul(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    return _linear(run, node, run.required(node, 1).T, None, 1.0)


def _linear(run: GraphImport, node: Node, weight: Tensor, bias: Tensor | None, beta: float) -> tuple[fx.Node, int]:
    """A linear layer of ``weight`` [outputs, inputs]."""
    if run.rank(node.inputs[0]) != 2 or weight.ndim != 2:
        raise run.refuse(node, "an input that is no [N, features]")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    shift = None if bias is None else (beta * bias.flatten()).expand(weight.shape[0])
    return run.call(node, _filled(layer, weight=weight, bias=shift)), 2


def _flatten(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    if node.attributes.get("axis", 1) != 1:
        raise run.refuse(node, f"axis {node.attributes['axis']}")
    return run.call(node, nn.Flatten()), 2


def _reshape(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    """To rows; the check at the end finds out where sizes that are computed say something else."""
    if node.inputs[1] in run.constants:
        wanted = run.constants[node.inputs[1]].tolist()
        if len(wanted) != 2:
            raise run.refuse(node, f"the shape {wanted}")
    return run.call(node, nn.Flatten()), 2


def _require_height_and_width(run: GraphImport, node: Node) -> None:
    """Refuse ``node`` unless its axes, an attribute or an input, are those of a map."""
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = run.constants.get(node.inputs[1], np.array([])).tolist()
    if run.rank(node.inputs[0]) != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise run.refuse(node, f"the axes {axes}")


def _squeeze(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    _require_height_and_width(run, node)
    return run.call(node, nn.Flatten()), 2


def _pool(kind: type[nn.MaxPool2d] | type[nn.AvgPool2d]) -> Operator:
    def add(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
        given = node.attributes
        if set(given.get("dilations", (1, 1))) != {1}:
            raise run.refuse(node, f"dilations {given['dilations']}")
        kernel, stride = tuple(given["kernel_shape"]), tuple(given.get("strides", (1, 1)))
        more = {} if kind is nn.MaxPool2d else {"count_include_pad": bool(given.get("count_include_pad", 0))}
        layer = kind(kernel, stride, _padding(run, node), ceil_mode=bool(given.get("ceil_mode", 0)), **more)
        return run.call(node, layer), 4

    return add


def _clip(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
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


def _same_shape(make: Callable[[Node], nn.Module]) -> Operator:
    """An operation that is a layer of torch, and keeps the rank."""
    return lambda run, node: (run.call(node, make(node)), run.rank(node.inputs[0]))


def _mean(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    _require_height_and_width(run, node)
    pooled = run.call(node, nn.AdaptiveAvgPool2d(1))
    if node.attributes.get("keepdims", 1):
        return pooled, 4
    run.values[node.output] = pooled
    return run.call(node, nn.Flatten(), node.output), 2


def _concat(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    rank = run.rank(node.inputs[0])
    return run.call(node, Concat(node.attributes["axis"] % rank), *node.inputs), rank


def _product(run: GraphImport, node: Node) -> tuple[fx.Node, int]:
    if any(name in run.constants for name in node.inputs):
        raise run.refuse(node, "a constant factor")
    return run.call(node, Multiply(), *node.inputs), max(run.rank(name) for name in node.inputs)


OPERATORS: dict[str, Operator] = {
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
