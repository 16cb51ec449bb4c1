"""Recognition of ReLU and PReLU that consist of smaller operations.

TensorFlow has no operator for PReLU. Its networks compute ``relu(x) + a * (x - |x|) / 2``,
``max(x, 0) + a * min(x, 0)``, ``relu(x) - a * relu(-x)`` or ``max(x, a * x)``. All of these multiply a channel by one
factor where it is positive and by another where it is negative. Such maps are followed through the graph by their two
factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qface.graph.edit import bypass, insert_layer
from qface.graph.layers import Add, ChannelAffine, Maximum
from qface.graph.queries import is_clamp, layer_of, limits_of, shape_of

__all__ = ["recognize_rectifiers"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class _Map:
    """The function ``positive * x`` for x >= 0 and ``negative * x`` for x < 0, per channel.

    Args:
        source: the node x.
        positive: [C], or [1] for all channels; on the CPU.
        negative: likewise.
    """

    source: fx.Node
    positive: Tensor
    negative: Tensor


def recognize_rectifiers(graph_module: fx.GraphModule) -> None:
    """Replace sums, differences, maxima, minima and scaled ones that are a ReLU or PReLU of one value."""
    maps: dict[fx.Node, _Map] = {}
    device = next((each.device for each in graph_module.parameters()), None)
    for node in list(graph_module.graph.nodes):
        found = _map_of(node, maps)
        if found is None:
            continue
        if _is_written_out(node, maps) and bool((found.positive == 1).all()):
            layer = _rectifier(found.negative, shape_of(node)[1]).to(device)
            bypass(node, insert_layer(graph_module, layer, (found.source,), node.name, node))
        else:
            maps[node] = found
    graph_module.graph.eliminate_dead_code()


def _is_written_out(node: fx.Node, maps: dict[fx.Node, _Map]) -> bool:
    """Return True if ``node`` joins two values, or scales a value that was joined."""
    return len(node.args) == 2 or (isinstance(layer_of(node), ChannelAffine) and node.args[0] in maps)


def _rectifier(slopes: Tensor, channels: int) -> nn.Module:
    if not slopes.any():
        return nn.ReLU()
    layer = nn.PReLU(channels)
    layer.weight.data.copy_(slopes.expand(channels))
    return layer


def _map_of(node: fx.Node, maps: dict[fx.Node, _Map]) -> _Map | None:
    """Return ``node`` as a map of one value; None if it is none."""
    if len(shape_of(node)) < 2 or not all(isinstance(each, fx.Node) for each in node.args) or node.kwargs:
        return None
    given = [maps.get(each) or _identity(each) for each in node.args if isinstance(each, fx.Node)]
    shapes = {shape_of(each) for each in (node, *node.all_input_nodes)}
    if len(given) not in (1, 2) or len({each.source for each in given}) > 1 or len(shapes) > 1:
        return None
    factors = _factors(node, given)
    return None if factors is None else _Map(given[0].source, *factors)


def _identity(node: fx.Node) -> _Map:
    one = torch.ones(1)
    return _Map(node, one, one)


def _factors(node: fx.Node, given: list[_Map]) -> tuple[Tensor, Tensor] | None:
    return _of_two(node, *given) if len(given) == 2 else _of_one(node, *given)


def _of_two(node: fx.Node, one: _Map, other: _Map) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a join of two maps; for x < 0 the smaller factor gives the larger value."""
    layer = layer_of(node)
    if isinstance(layer, Add):
        return one.positive + other.positive, one.negative + other.negative
    if node.target is _ATEN.sub.Tensor:
        return one.positive - other.positive, one.negative - other.negative
    if isinstance(layer, Maximum) or node.target is _ATEN.maximum.default:
        return torch.maximum(one.positive, other.positive), torch.minimum(one.negative, other.negative)
    if node.target is _ATEN.minimum.default:
        return torch.minimum(one.positive, other.positive), torch.maximum(one.negative, other.negative)
    return None


def _of_one(node: fx.Node, given: _Map) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a function of one map."""
    layer = layer_of(node)
    if layer is not None and is_clamp(node):
        limits = limits_of(layer)
        if limits == (0.0, None):
            return given.positive.clamp(min=0), given.negative.clamp(max=0)
        return (given.positive.clamp(max=0), given.negative.clamp(min=0)) if limits == (None, 0.0) else None
    if node.target is _ATEN.abs.default:
        return given.positive.abs(), -given.negative.abs()
    if isinstance(layer, ChannelAffine) and not layer.bias.any() and _scales_channels(layer, len(shape_of(node))):
        weight = layer.weight.detach().cpu()
        return given.positive * weight, given.negative * weight
    return None


def _scales_channels(layer: ChannelAffine, rank: int) -> bool:
    return layer.num_channels == 1 or layer.dim % rank == 1
