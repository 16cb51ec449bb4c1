"""Preparation of PReLU for integer kernels: one slope per channel, and slopes <= 1 if possible.

With slopes a <= 1 a PReLU is max(x, a x), two cheap integer operations. For a > 1, prelu_a(x) = -prelu_(1/a)(-a x);
the factors -a and -1 are folded into the weights of the layers before and after it. The outputs do not change.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx, nn

from qface.graph.channel_factors import Scalable, scale_inputs, scale_outputs
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["fold_steep_prelu_slopes", "one_slope_per_channel", "prepare_prelu_slopes"]


def prepare_prelu_slopes(graph_module: fx.GraphModule) -> None:
    """Give every PReLU one slope per channel, <= 1 if its neighbors can absorb the factors."""
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, nn.PReLU):
            shape = shape_of(input_of(node))
            one_slope_per_channel(layer, shape[1])
            fold_steep_prelu_slopes(node, len(shape))


def one_slope_per_channel(layer: nn.PReLU, channels: int) -> None:
    """Repeat the only slope of ``layer`` for ``channels`` channels, in place."""
    if layer.num_parameters == 1:
        layer.num_parameters = channels
        layer.weight = nn.Parameter(layer.weight.detach().repeat(channels))


def fold_steep_prelu_slopes(node: fx.Node, rank: int) -> None:
    """Make the slopes of a PReLU <= 1 in place, if the layers before and after it can absorb the factors.

    Args:
        node: the node that calls the PReLU.
        rank: number of dimensions of its output.
    """
    layer = cast(nn.PReLU, layer_of(node))
    producer = cast(fx.Node, node.args[0])
    before, readers = layer_of(producer), [layer_of(reader) for reader in node.users]
    if len(producer.users) > 1 or not all(_takes_factors(neighbor, rank) for neighbor in (before, *readers)):
        return
    slopes = layer.weight.detach().clone()
    steep = slopes > 1
    one = torch.ones_like(slopes)
    scale_outputs(cast(Scalable, before), torch.where(steep, -slopes, one))
    layer.weight.data.copy_(torch.where(steep, 1 / slopes, slopes))
    for reader in readers:
        scale_inputs(cast(Scalable, reader), torch.where(steep, -one, one))


def _takes_factors(layer: nn.Module | None, rank: int) -> bool:
    """True if ``layer`` can absorb factors per channel; a linear layer can only on [N, features]."""
    return isinstance(layer, Scalable) and (rank == 2 or not isinstance(layer, nn.Linear))
