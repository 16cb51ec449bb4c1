"""L2 normalization that a network writes out in smaller operations: it is recognized and replaced by the one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from qface.graph.edit import bypass, insert_layer
from qface.graph.layers import ChannelAffine, L2Normalize, Multiply
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["recognize_normalization"]

_SMALLEST_NORM = 1e-3  # limits and additions below it only keep a division by zero away


def recognize_normalization(graph_module: fx.GraphModule) -> None:
    """Replace ``x / norm(x)`` of rows, however the norm is kept from zero."""
    for node in list(graph_module.graph.nodes):
        value = _normalized(node)
        if value is not None:
            bypass(node, insert_layer(graph_module, L2Normalize(), (value,), node.name, node))
    graph_module.graph.eliminate_dead_code()


def _normalized(node: fx.Node) -> fx.Node | None:
    """The rows that ``node`` divides by their norm."""
    if node.op != "call_function" or node.target is not torch.ops.aten.div.Tensor:
        return None
    value, norm = node.args[0], node.args[1]
    if not isinstance(value, fx.Node) or not isinstance(norm, fx.Node) or len(shape_of(value)) != 2:
        return None
    while (before := _before_guard(norm)) is not None:
        norm = before
    return value if _is_norm_of(norm, value) else None


def _before_guard(node: fx.Node) -> fx.Node | None:
    """What an expansion, a lower limit or a small addition was made of."""
    layer = layer_of(node)
    if node.op == "call_function" and node.target in (torch.ops.aten.expand.default, torch.ops.aten.expand_as.default):
        return input_of(node)
    if isinstance(layer, nn.Hardtanh) and layer.max_val == float("inf") and 0 <= layer.min_val < _SMALLEST_NORM:
        return input_of(node)
    if isinstance(layer, ChannelAffine) and layer.num_channels == 1:
        added = float(layer.weight.detach()) == 1 and 0 <= float(layer.bias.detach()) < _SMALLEST_NORM
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
    return isinstance(layer_of(square), Multiply) and square.args == (value, value)


_NORMS: tuple[Callable[[fx.Node, fx.Node], bool], ...] = (_vector_norm, _scalar_norm, _root_of_sum)
