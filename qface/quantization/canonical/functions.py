"""Functions and methods of torch as layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qface.models.layers import Add, Concat, L2Normalize, Multiply
from qface.quantization.canonical.graph_edit import Inputs, add_layer, argument_of, inputs_of, shape_of

__all__ = ["functions_to_layers"]

Rewrite = Callable[[fx.Node], "tuple[nn.Module, Inputs] | None"]


def functions_to_layers(graph_module: fx.GraphModule) -> None:
    """Replace all that a layer can stand for, by the shapes of its tensors; the rest stays."""
    for node in list(graph_module.graph.nodes):
        rewrite = _rewrite_of(node)
        found = rewrite(node) if rewrite else None
        if found is not None:
            layer, inputs = found
            _replace_by_layer(graph_module, node, layer, inputs)
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # the ``contiguous`` that a view may need is gone
    graph_module.graph.eliminate_dead_code()


def _rewrite_of(node: fx.Node) -> Rewrite | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None


def _replace_by_layer(graph_module: fx.GraphModule, node: fx.Node, layer: nn.Module, inputs: Inputs) -> None:
    for part in layer if isinstance(layer, nn.Sequential) else (layer,):
        target = add_layer(graph_module, node.name, part.train(graph_module.training))
        with graph_module.graph.inserting_before(node):
            replacement = graph_module.graph.call_module(target, inputs)
        inputs = (replacement,)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph_module.graph.erase_node(node)


def _simple(layer: Callable[[], nn.Module]) -> Rewrite:
    return lambda node: (layer(), inputs_of(node))


def _leaky_relu(node: fx.Node) -> tuple[nn.Module, Inputs]:
    return nn.LeakyReLU(argument_of(node, 1, "negative_slope", 0.01)), inputs_of(node)


def _binary(layer: Callable[[], nn.Module]) -> Rewrite:
    """Two tensors; a tensor and a number stay a function."""

    def rewrite(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
        left, right = argument_of(node, 0, "input"), argument_of(node, 1, "other")
        plain = isinstance(left, fx.Node) and isinstance(right, fx.Node) and "alpha" not in node.kwargs
        return (layer(), (left, right)) if plain and shape_of(left) and shape_of(right) else None

    return rewrite


def _concat(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    tensors = argument_of(node, 0, "tensors")
    if not isinstance(tensors, (list, tuple)):  # the parts of something, which torch.fx does not see one by one
        return None
    return Concat(argument_of(node, 1, "dim", 0) % len(shape_of(node))), tuple(tensors)


def _flatten(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """Any reshape to [N, all the rest]."""
    inputs = inputs_of(node)
    before, after = shape_of(inputs[0]), shape_of(node)
    return (nn.Flatten(1), inputs) if len(after) == 2 and before and before[0] == after[0] else None


def _mean(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """The mean over height and width, which keeps both dimensions or drops them."""
    inputs = inputs_of(node)
    before, after = shape_of(inputs[0]), shape_of(node)
    axes = argument_of(node, 1, "dim")
    if len(before) != 4 or not isinstance(axes, (list, tuple)) or {axis % 4 for axis in axes} != {2, 3}:
        return None
    pool = nn.AdaptiveAvgPool2d(1)
    return (pool if len(after) == 4 else nn.Sequential(pool, nn.Flatten(1))), inputs


def _adaptive_pool(node: fx.Node) -> tuple[nn.Module, Inputs]:
    size = argument_of(node, 1, "output_size")
    return nn.AdaptiveAvgPool2d(shape_of(node)[-2:] if _computed(size) else size), inputs_of(node)


def _computed(value: Any) -> bool:
    """Whether ``value`` depends on the shape of a tensor, as in ``F.avg_pool2d(x, x.size()[2:])``."""
    if isinstance(value, (tuple, list)):
        return any(_computed(part) for part in value)
    return isinstance(value, fx.Node)


def _normalize(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    euclidean = argument_of(node, 1, "p", 2.0) == 2
    by_rows = argument_of(node, 2, "dim", 1) in (1, -1) and len(shape_of(node)) == 2
    return (L2Normalize(), inputs_of(node)) if euclidean and by_rows else None


def _window(layer: Callable[..., nn.Module]) -> Rewrite:
    def rewrite(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
        if len(node.args) > 4 or node.kwargs.get("divisor_override") or node.kwargs.get("return_indices"):
            return None
        kernel = argument_of(node, 1, "kernel_size")
        stride = argument_of(node, 2, "stride") or kernel
        if _computed((*node.args[1:], *node.kwargs.values())):
            return _over_the_map(layer, node)
        rest = {
            name: value for name, value in node.kwargs.items() if name in ("ceil_mode", "count_include_pad", "dilation")
        }
        return layer(kernel, stride, argument_of(node, 3, "padding", 0), **rest), inputs_of(node)

    return rewrite


def _over_the_map(layer: Callable[..., nn.Module], node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """What a pool of a computed window mostly is: one over the whole map."""
    inputs = inputs_of(node)
    return (layer(shape_of(inputs[0])[-2:]), inputs) if shape_of(node)[-2:] == (1, 1) else None


_ADD, _MULTIPLY = _binary(Add), _binary(Multiply)
_FUNCTIONS: dict[Any, Rewrite] = {
    operator.add: _ADD,
    operator.iadd: _ADD,
    torch.add: _ADD,
    operator.mul: _MULTIPLY,
    operator.imul: _MULTIPLY,
    torch.mul: _MULTIPLY,
    torch.cat: _concat,
    torch.relu: _simple(nn.ReLU),
    F.relu: _simple(nn.ReLU),
    F.relu6: _simple(nn.ReLU6),
    F.leaky_relu: _leaky_relu,
    F.hardswish: _simple(nn.Hardswish),
    F.hardsigmoid: _simple(nn.Hardsigmoid),
    F.silu: _simple(nn.SiLU),
    F.sigmoid: _simple(nn.Sigmoid),
    torch.sigmoid: _simple(nn.Sigmoid),
    torch.flatten: _flatten,
    torch.reshape: _flatten,
    torch.squeeze: _flatten,
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _adaptive_pool,
    F.avg_pool2d: _window(nn.AvgPool2d),
    F.max_pool2d: _window(nn.MaxPool2d),
    F.normalize: _normalize,
}
_METHODS: dict[str, Rewrite] = {
    "add": _ADD,
    "add_": _ADD,
    "mul": _MULTIPLY,
    "mul_": _MULTIPLY,
    "relu": _simple(nn.ReLU),
    "relu_": _simple(nn.ReLU),
    "sigmoid": _simple(nn.Sigmoid),
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    "squeeze": _flatten,
    "mean": _mean,
}
