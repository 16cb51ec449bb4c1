"""Recognition of L2 normalization that consists of smaller operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from qface.graph.edit import bypass, insert_layer
from qface.graph.layers import ChannelAffine, L2Normalize, Multiply
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["recognize_normalization"]

_ATEN = torch.ops.aten
_SMALLEST_NORM = 1e-3  # maximum lower clamp of the norm that counts as a guard against division by zero
_SMALLEST_ADDITION = 1e-6  # the same for an added constant


def recognize_normalization(graph_module: fx.GraphModule) -> None:
    """Replace ``x / norm(x)`` of rows by L2Normalize, with any guard against division by zero."""
    for node in list(graph_module.graph.nodes):
        value = _normalized(node)
        if value is not None:
            bypass(node, insert_layer(graph_module, L2Normalize(), (value,), node.name, node))
    graph_module.graph.eliminate_dead_code()


def _normalized(node: fx.Node) -> fx.Node | None:
    """Return the rows that ``node`` normalizes, by a division or a product with the inverse norm, or None."""
    if _is_function(node, _ATEN.div.Tensor):
        value = node.args[0]
        return _as_rows(value) if _is_norm(_without_guards(node.args[1]), value) else None
    if not isinstance(layer_of(node), Multiply) or len(node.args) != 2:
        return None
    for value, factor in (node.args, node.args[::-1]):
        if _is_inverse_norm(_without_guards(factor), value):
            return _as_rows(value)
    return None


def _is_inverse_norm(node: Any, value: Any) -> bool:
    """True if ``node`` is ``rsqrt(sum(x * x))``, ``sum(x * x) ** -0.5`` or the reciprocal of a norm of ``value``."""
    if _is_function(node, _ATEN.reciprocal.default):
        return _is_norm(_without_guards(input_of(node)), value)
    if _is_function(node, _ATEN.rsqrt.default):
        return _is_sum_of_squares(input_of(node), value)
    power = _is_function(node, _ATEN.pow.Tensor_Scalar) and node.args[1] == -0.5
    return power and _is_sum_of_squares(input_of(node), value)


def _is_norm(node: Any, value: Any) -> bool:
    return any(matches(node, value) for matches in (_is_vector_norm, _is_scalar_norm, _is_root_of_sum))


def _as_rows(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) and len(shape_of(value)) == 2 else None


def _without_guards(node: Any) -> Any:
    """Return the producer before expansions, lower clamps and small additions."""
    while isinstance(node, fx.Node) and _is_guard(node):
        node = input_of(node)
    return node


def _is_guard(node: fx.Node) -> bool:
    layer = layer_of(node)
    if node.op == "call_function":
        return node.target in (_ATEN.expand.default, _ATEN.expand_as.default)
    if isinstance(layer, nn.Hardtanh):
        return layer.max_val == math.inf and 0 <= layer.min_val <= _SMALLEST_NORM
    if isinstance(layer, ChannelAffine) and layer.num_channels == 1:
        return layer.weight.item() == 1 and 0 <= layer.bias.item() <= _SMALLEST_ADDITION
    return False


def _is_function(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments, followed by None for omitted ones."""
    return (*node.args, *(None,) * 4)


def _is_last_of_rows(dims: Any) -> bool:
    return isinstance(dims, (list, tuple)) and list(dims) in ([1], [-1])


def _is_vector_norm(node: Any, value: Any) -> bool:
    if not _is_function(node, _ATEN.linalg_vector_norm.default):
        return False
    source, order, dims, *_ = _arguments(node)
    return source is value and order in (None, 2) and _is_last_of_rows(dims)


def _is_scalar_norm(node: Any, value: Any) -> bool:
    if not _is_function(node, _ATEN.norm.ScalarOpt_dim):
        return False
    source, order, dims, *_ = _arguments(node)
    return source is value and order == 2 and _is_last_of_rows(dims)


def _is_root_of_sum(node: Any, value: Any) -> bool:
    return _is_function(node, _ATEN.sqrt.default) and _is_sum_of_squares(input_of(node), value)


def _is_sum_of_squares(node: fx.Node, value: Any) -> bool:
    """True if ``node`` is ``sum(x * x)`` or ``sum(x ** 2)`` of ``value``."""
    total = _without_guards(node)
    if not _is_function(total, _ATEN.sum.dim_IntList) or not _is_last_of_rows(_arguments(total)[1]):
        return False
    square = input_of(total)
    if _is_function(square, _ATEN.pow.Tensor_Scalar):
        return square.args == (value, 2)
    return isinstance(layer_of(square), Multiply) and square.args == (value, value)
