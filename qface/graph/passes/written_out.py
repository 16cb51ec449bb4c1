"""Layers that a network writes out in smaller operations: each is recognized and replaced by the one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from qface.graph.edit import bypass, insert_layer
from qface.graph.layers import ChannelAffine, L2Normalize, Multiply
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["recognize_layers"]

_SMALLEST_NORM = 1e-3  # limits and additions below it only keep a division by zero away


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


def _is_affine(node: object, scale: float, shift: float) -> bool:
    """True if ``node`` is ``scale * x + shift`` with these numbers."""
    layer = layer_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(layer, ChannelAffine) or layer.num_channels != 1:
        return False
    return abs(layer.weight.item() - scale) < 1e-6 and abs(layer.bias.item() - shift) < 1e-6


def _only_for(node: fx.Node, user: fx.Node) -> bool:
    return set(node.users) == {user}


def _hard_sigmoid(node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """``relu6(x + 3) / 6``, or ``clamp(x / 6 + 0.5, 0, 1)``."""
    if _is_affine(node, 1 / 6, 0) and _is_shifted_relu6(input_of(node)):
        return nn.Hardsigmoid(), input_of(input_of(input_of(node)))
    layer = layer_of(node)
    is_unit_clamp = isinstance(layer, nn.Hardtanh) and (layer.min_val, layer.max_val) == (0, 1)
    if is_unit_clamp and _is_affine(input_of(node), 1 / 6, 0.5):
        return nn.Hardsigmoid(), input_of(input_of(node))
    return None


def _is_shifted_relu6(node: object) -> bool:
    return _is_call(node, nn.ReLU6) and _is_affine(input_of(node), 1, 3)  # type: ignore[arg-type]


def _gated(node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """``x * hardsigmoid(x)`` and ``x * sigmoid(x)``; also ``x * relu6(x + 3)`` times 1 / 6 after it."""
    if _is_affine(node, 1 / 6, 0) and _is_call(input_of(node), Multiply) and _only_for(input_of(node), node):
        for value, gate in _orders(input_of(node)):
            if _is_shifted_relu6(gate) and input_of(input_of(gate)) is value:
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
    """``x / norm(x)`` of rows, however the norm is kept from zero."""
    if node.op != "call_function" or node.target is not torch.ops.aten.div.Tensor:
        return None
    value, norm = node.args[0], node.args[1]
    if not isinstance(value, fx.Node) or not isinstance(norm, fx.Node) or len(shape_of(value)) != 2:
        return None
    while (before := _before_guard(norm)) is not None:
        norm = before
    return (L2Normalize(), value) if _is_norm_of(norm, value) else None


def _before_guard(node: fx.Node) -> fx.Node | None:
    """What an expansion, a lower limit or a small addition was made of."""
    layer = layer_of(node)
    if node.op == "call_function" and node.target in (torch.ops.aten.expand.default, torch.ops.aten.expand_as.default):
        return input_of(node)
    if isinstance(layer, nn.Hardtanh) and layer.max_val == float("inf") and 0 <= layer.min_val < _SMALLEST_NORM:
        return input_of(node)
    if isinstance(layer, ChannelAffine) and layer.num_channels == 1:
        added = layer.weight.item() == 1 and 0 <= layer.bias.item() < _SMALLEST_NORM
        return input_of(node) if added else None
    return None


def _is_norm_of(node: fx.Node, value: fx.Node) -> bool:
    return any(matches(node, value) for matches in _NORMS)


def _is_function(node: fx.Node, target: Any) -> bool:
    return node.op == "call_function" and node.target is target


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Those given by position, and None for up to four more."""
    return (*node.args, *(None,) * 4)


def _is_last_of_rows(dims: Any) -> bool:
    return isinstance(dims, (list, tuple)) and list(dims) in ([1], [-1])


def _vector_norm(node: fx.Node, value: fx.Node) -> bool:
    source, order, dims, *_ = _arguments(node)
    is_norm = _is_function(node, torch.ops.aten.linalg_vector_norm.default)
    return is_norm and source is value and order in (None, 2) and _is_last_of_rows(dims)


def _scalar_norm(node: fx.Node, value: fx.Node) -> bool:
    source, order, dims, *_ = _arguments(node)
    is_norm = _is_function(node, torch.ops.aten.norm.ScalarOpt_dim)
    return is_norm and source is value and order == 2 and _is_last_of_rows(dims)


def _root_of_sum(node: fx.Node, value: fx.Node) -> bool:
    """``sqrt(sum(x * x))`` or of ``x ** 2``."""
    if not _is_function(node, torch.ops.aten.sqrt.default):
        return False
    total = input_of(node)
    if not _is_function(total, torch.ops.aten.sum.dim_IntList) or not _is_last_of_rows(_arguments(total)[1]):
        return False
    square = input_of(total)
    if _is_function(square, torch.ops.aten.pow.Tensor_Scalar):
        return square.args == (value, 2)
    return _is_call(square, Multiply) and square.args == (value, value)


_NORMS: tuple[Callable[[fx.Node, fx.Node], bool], ...] = (_vector_norm, _scalar_norm, _root_of_sum)
