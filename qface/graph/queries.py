"""Questions about a graph of layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from qface.graph.layers import Maximum, Pad, Permute, Reshape, Slice, UpsampleNearest

__all__ = [
    "CLAMPS",
    "SHAPE_ONLY",
    "SYMBOLIC_FUNCTIONS",
    "input_of",
    "is_clamp",
    "is_layer_graph",
    "is_shape_only",
    "layer_of",
    "limits_of",
    "makes_rows",
    "pair_of",
    "shape_of",
    "source_of_values",
]

SHAPE_ONLY = (
    nn.Flatten,
    nn.MaxPool2d,
    nn.Identity,
    Pad,
    Permute,
    Reshape,
    Slice,
    UpsampleNearest,
)
"""Layers that move, drop or repeat values, or add zeros, but make no other values."""

SYMBOLIC_FUNCTIONS = frozenset(
    (
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        torch.sym_max,
        torch.sym_min,
    )
)
"""Functions by which a network computes with the number of images."""


def layer_of(node: fx.Node) -> nn.Module | None:
    """The layer that ``node`` calls, if it calls one."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


def input_of(node: fx.Node) -> fx.Node:
    """The first value that ``node`` reads."""
    return cast(fx.Node, node.args[0])


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` makes for a batch of two, () where it makes none."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


def is_shape_only(node: fx.Node) -> bool:
    """True if ``node`` makes no values of its own, so that its result is quantized as its input is."""
    layer = layer_of(node)
    if isinstance(layer, Maximum):  # of parts of one tensor
        return len({source_of_values(each) for each in node.all_input_nodes}) == 1
    return isinstance(layer, SHAPE_ONLY)


CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


def is_clamp(node: fx.Node) -> bool:
    """True if ``node`` is an activation function that the rounding after it can apply."""
    return isinstance(layer_of(node), CLAMPS)


def limits_of(clamp: nn.Module) -> tuple[float | None, float | None]:
    """Least and greatest value that ``clamp`` lets pass; None is no limit."""
    if isinstance(clamp, nn.Hardtanh):  # ReLU6 is one
        low, high = float(clamp.min_val), float(clamp.max_val)
        return (None if math.isinf(low) else low), (None if math.isinf(high) else high)
    assert isinstance(clamp, nn.ReLU)
    return 0.0, None


def source_of_values(node: fx.Node) -> fx.Node:
    """The node whose values ``node`` has: itself, or what is before a chain of shape-only layers."""
    while is_shape_only(node):
        node = input_of(node)
    return node


def makes_rows(node: fx.Node) -> bool:
    """True if ``node`` flattens what an image becomes to [N, features]."""
    layer = layer_of(node)
    return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)


def pair_of(size: int | Sequence[int]) -> tuple[int, int]:
    """A setting for height and width, such as a kernel size, which torch also takes as one number."""
    first, second = (size, size) if isinstance(size, int) else size
    return int(first), int(second)


def is_layer_graph(model: nn.Module) -> bool:
    """True if ``model`` consists of layers, each called once, and ATen functions, as ``capture`` makes it."""
    if not isinstance(model, fx.GraphModule):
        return False
    called = [node.target for node in model.graph.nodes if node.op == "call_module"]
    return len(set(called)) == len(called) and all(_is_captured(node) for node in model.graph.nodes)


def _is_captured(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        return known or node.target in SYMBOLIC_FUNCTIONS
    return node.op != "call_method"
