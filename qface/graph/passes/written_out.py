"""Layers that a network writes out in smaller operations: each is recognized and replaced by the one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from qface.graph.edit import bypass, insert_layer
from qface.graph.layers import ChannelAffine, L2Normalize, Multiply
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["recognize_layers"]

_ATEN = torch.ops.aten
_ROUNDING = 1e-6
_SMALLEST_NORM = 1e-3  # a lower limit up to it only keeps a division by zero away
_SMALLEST_ADDITION = 1e-6  # and so does an addition


def recognize_layers(graph_module: fx.GraphModule) -> None:
    """Replace hard sigmoid, hard swish, SiLU and L2 normalization that are written out."""
    for node in list(graph_module.graph.nodes):
        for recognize in (_hard_sigmoid, _gated, _l2_normalize):
            found = recognize(node)
            if found is not None:
                layer, source = found
                bypass(node, insert_layer(graph_module, layer, (source,), node.name, node))
                break
    graph_module.graph.eliminate_dead_code()


def _is_call(node: object, kind: type[nn.Module]) -> bool:
    return isinstance(node, fx.Node) and isinstance(layer_of(node), kind)


def _before_affine(node: object, scale: float, shift: float) -> fx.Node | None:
    """The ``x`` of which ``node`` is ``scale * x + shift``, in one step or several, each with one number."""
    factor, summand = 1.0, 0.0
    while isinstance(node, fx.Node):
        layer = layer_of(node)
        if not isinstance(layer, ChannelAffine) or layer.num_channels != 1:
            break
        summand += factor * layer.bias.item()
        factor *= layer.weight.item()
        node = input_of(node)
        if abs(factor - scale) < _ROUNDING and abs(summand - shift) < _ROUNDING:
            return node
    return None


def _only_for(node: fx.Node, user: fx.Node) -> bool:
    return set(node.users) == {user}


def _hard_sigmoid(node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """``relu6(x + 3) / 6``, or ``clamp(x / 6 + 0.5, 0, 1)``."""
    source = _before_shifted_relu6(_before_affine(node, 1 / 6, 0))
    layer = layer_of(node)
    if isinstance(layer, nn.Hardtanh) and (layer.min_val, layer.max_val) == (0, 1):
        source = _before_affine(input_of(node), 1 / 6, 0.5)
    return None if source is None else (nn.Hardsigmoid(), source)


def _before_shifted_relu6(node: object) -> fx.Node | None:
    """The ``x`` of ``relu6(x + 3)``."""
    return _before_affine(input_of(node), 1, 3) if _is_call(node, nn.ReLU6) else None  # type: ignore[arg-type]


def _gated(node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """``x * hardsigmoid(x)`` and ``x * sigmoid(x)``; also ``x * relu6(x + 3)`` times 1 / 6 after it."""
    product = _before_affine(node, 1 / 6, 0)
    if product is not None and _is_call(product, Multiply) and _only_for(product, node):
        for value, gate in _orders(product):
            if _before_shifted_relu6(gate) is value:
                return nn.Hardswish(), value
    if not _is_call(node, Multiply):
        return None
    for value, gate in _orders(node):
        if _is_call(gate, nn.Hardsigmoid) and input_of(gate) is value:
            return nn.Hardswish(), value
        if _is_call(gate, nn.Sigmoid) and input_of(gate) is value:
            return nn.SiLU(), value
    return None


def _orders(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node, node)
    yield left, right
    yield right, left


def _l2_normalize(node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """``x / norm(x)`` of rows, or ``x * rsqrt(sum(x * x))``, whatever keeps the norm from zero."""
    if _is_function(node, _ATEN.div.Tensor):
        value, norm = node.args[0], _without_guards(node.args[1])
        found = any(matches(norm, value) for matches in (_is_vector_norm, _is_scalar_norm, _is_root_of_sum))
        return (L2Normalize(), value) if found and _is_rows(value) else None  # type: ignore[return-value]
    if _is_call(node, Multiply):
        for value, factor in _orders(node):
            inverse = _without_guards(factor)
            if _is_function(inverse, _ATEN.rsqrt.default) and _is_sum_of_squares(input_of(inverse), value):
                return (L2Normalize(), value) if _is_rows(value) else None
    return None


def _is_rows(value: Any) -> bool:
    return isinstance(value, fx.Node) and len(shape_of(value)) == 2


def _without_guards(node: Any) -> Any:
    """What ``node`` was before expansions, lower limits and small additions."""
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
    """Those given by position, and None for up to four more."""
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
    """True if ``node`` is ``sum(x * x)``, or of ``x ** 2``."""
    total = _without_guards(node)
    if not _is_function(total, _ATEN.sum.dim_IntList) or not _is_last_of_rows(_arguments(total)[1]):
        return False
    square = input_of(total)
    if _is_function(square, _ATEN.pow.Tensor_Scalar):
        return square.args == (value, 2)
    return _is_call(square, Multiply) and square.args == (value, value)
