"""Replacement of hard sigmoid, hard swish, SiLU and LeakyReLU by layers that have integer kernels.

A clamp is part of the quantization of the layer before it, so a hard sigmoid after a convolution is free. In
onnxruntime a SiLU of two integer kernels takes less than half the time of the float one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx, nn

from qface.graph.aten import clamp_layer
from qface.graph.edit import bypass, insert_layer, set_layer
from qface.graph.layers import ChannelAffine, Multiply
from qface.graph.queries import input_of, is_clamp, layer_of, limits_of, shape_of

__all__ = ["activations_to_products", "leaky_relu_to_prelu", "merge_clamps", "scales_before_clamps"]


def merge_clamps(graph_module: fx.GraphModule) -> None:
    """Merge each clamp with a clamp before it: ReLU6 may be written as a ReLU and a minimum."""
    for node in list(graph_module.graph.nodes):
        if not is_clamp(node) or not is_clamp(input_of(node)) or len(input_of(node).users) > 1:
            continue
        first, second = (limits_of(cast(nn.Module, layer_of(each))) for each in (input_of(node), node))
        low, high = (_limited(limit, *second, default) for limit, default in zip(first, second, strict=True))
        set_layer(graph_module, str(node.target), clamp_layer(low, high))
        before = input_of(node)
        bypass(before, input_of(before))


def _limited(limit: float | None, low: float | None, high: float | None, default: float | None) -> float | None:
    """Return ``limit`` clamped to ``low``..``high``; None is no limit, and becomes ``default``."""
    if limit is None:
        return default
    limit = limit if low is None else max(limit, low)
    return limit if high is None else min(limit, high)


def activations_to_products(graph_module: fx.GraphModule) -> None:
    """Replace hard sigmoid by a clamped affine map, hard swish and SiLU by a product with a gate."""
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if isinstance(layer, nn.Hardsigmoid):
            bypass(node, _hard_sigmoid(graph_module, node))
        elif isinstance(layer, (nn.Hardswish, nn.SiLU)):
            x = input_of(node)
            if isinstance(layer, nn.SiLU):
                gate = insert_layer(graph_module, nn.Sigmoid(), (x,), f"{node.name}_gate", node)
            else:
                gate = _hard_sigmoid(graph_module, node)
            bypass(node, insert_layer(graph_module, Multiply(), (x, gate), node.name, node))


def leaky_relu_to_prelu(graph_module: fx.GraphModule) -> None:
    """Replace LeakyReLU on [N, C] or [N, C, H, W] by PReLU with one slope, which has an int32 kernel."""
    device = next((each.device for each in graph_module.parameters()), None)
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, nn.LeakyReLU) and len(shape_of(node)) in (2, 4):
            set_layer(graph_module, str(node.target), nn.PReLU(1, layer.negative_slope, device=device))


def _hard_sigmoid(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Insert ``clamp(x / 6 + 1 / 2, 0, 1)`` of the input of ``node``."""
    scaled = insert_layer(graph_module, _number(1 / 6, 1 / 2), (input_of(node),), f"{node.name}_map", node)
    return insert_layer(graph_module, clamp_layer(0.0, 1.0), (scaled,), f"{node.name}_clamp", node)


def _number(scale: float, shift: float) -> ChannelAffine:
    """Return the scalar map ``scale * x + shift``."""
    layer = ChannelAffine(1)
    with torch.no_grad():
        layer.weight.fill_(scale)
        layer.bias.fill_(shift)
    return layer


def scales_before_clamps(graph_module: fx.GraphModule) -> None:
    """Move scalar maps before clamps, where they can be folded into the layer before.

    ``relu6(x + 3) / 6`` becomes ``clamp(x / 6 + 1 / 2, 0, 1)``. The factor of a product with a clamp, as in
    ``x * relu6(x + 3) / 6``, is moved to the clamp first.
    """
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if not _is_positive_number(layer):
            continue
        clamp = _clamp_in(input_of(node), cast(ChannelAffine, layer))
        if clamp is None:
            continue
        affine = cast(ChannelAffine, layer)
        scale, shift = float(affine.weight.detach()), float(affine.bias.detach())
        limits = limits_of(cast(nn.Module, layer_of(clamp)))
        name = f"{clamp.name}_map"
        clamp.args = (insert_layer(graph_module, _number(scale, shift), clamp.all_input_nodes, name, clamp),)
        low, high = (None if limit is None else limit * scale + shift for limit in limits)
        set_layer(graph_module, str(clamp.target), clamp_layer(low, high))
        bypass(node, input_of(node))


def _is_positive_number(layer: nn.Module | None) -> bool:
    return isinstance(layer, ChannelAffine) and layer.num_channels == 1 and float(layer.weight.detach()) > 0


def _clamp_in(node: fx.Node, layer: ChannelAffine) -> fx.Node | None:
    """Return the clamp before which ``layer`` can move: ``node``, or an input of the product ``node``.

    None if there is none, or if it has other consumers.
    """
    if len(node.users) > 1:
        return None
    if is_clamp(node):
        return node
    if isinstance(layer_of(node), Multiply) and float(layer.bias.detach()) == 0:
        return next((each for each in node.all_input_nodes if is_clamp(each) and len(each.users) == 1), None)
    return None
