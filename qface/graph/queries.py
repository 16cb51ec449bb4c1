"""Queries on graphs of layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from qface.graph.layers import FakeQuantizer, Maximum, Pad, Permute, Reshape, Slice, UpsampleNearest

__all__ = [
    "CLAMPS",
    "SHAPE_ONLY",
    "SYMBOLIC_FUNCTIONS",
    "input_of",
    "is_clamp",
    "is_layer_graph",
    "is_quantized",
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
"""Layers that only move, drop or repeat values, or add zeros."""

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
"""Functions with which a network computes sizes from the batch size."""


def layer_of(node: fx.Node) -> nn.Module | None:
    """Return the layer that ``node`` calls; None if it calls none."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


def input_of(node: fx.Node) -> fx.Node:
    """Return the producer of the first input of ``node``."""
    return cast(fx.Node, node.args[0])


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the output of ``node`` for a batch of two images; () if it is not a tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


def is_shape_only(node: fx.Node) -> bool:
    """True if ``node`` creates no new values, so that its output can have the scale of its input."""
    layer = layer_of(node)
    if isinstance(layer, Maximum):  # of slices of the same tensor (max-feature-map)
        return len({source_of_values(each) for each in node.all_input_nodes}) == 1
    return isinstance(layer, SHAPE_ONLY)


CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


def is_clamp(node: fx.Node) -> bool:
    """True if ``node`` is a clamp, which the saturation of the quantizer after it can apply."""
    return isinstance(layer_of(node), CLAMPS)


def limits_of(clamp: nn.Module) -> tuple[float | None, float | None]:
    """Return the minimum and maximum output of ``clamp``; None is no limit."""
    if isinstance(clamp, nn.Hardtanh):  # includes ReLU6
        low, high = float(clamp.min_val), float(clamp.max_val)
        return (None if math.isinf(low) else low), (None if math.isinf(high) else high)
    assert isinstance(clamp, nn.ReLU)
    return 0.0, None


def source_of_values(node: fx.Node) -> fx.Node:
    """Return the producer before a chain of shape-only layers that ends at ``node``, or ``node`` itself."""
    while is_shape_only(node):
        node = input_of(node)
    return node


def makes_rows(node: fx.Node) -> bool:
    """True if ``node`` flattens its input to [N, features]."""
    layer = layer_of(node)
    return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)


def pair_of(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a setting for height and width, such as a kernel size, as a pair."""
    first, second = (size, size) if isinstance(size, int) else size
    return int(first), int(second)


def is_layer_graph(model: nn.Module) -> bool:
    """True if ``model`` consists of layers that are called once and ATen functions, like a captured graph."""
    if not isinstance(model, fx.GraphModule):
        return False
    called = [node.target for node in model.graph.nodes if node.op == "call_module"]
    return len(set(called)) == len(called) and all(_is_captured(node) for node in model.graph.nodes)


def _is_captured(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        return known or node.target in SYMBOLIC_FUNCTIONS
    return node.op != "call_method"


def is_quantized(model: nn.Module) -> bool:
    """Return True if ``model`` contains fake-quant modules.

    Args:
        model: any module.
    """
    return any(isinstance(module, FakeQuantizer) for module in model.modules())
