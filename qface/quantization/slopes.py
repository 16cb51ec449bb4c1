"""PReLU made ready for integers: one slope a channel, and none above 1 where the layers around it can make up for that.

With all slopes at most 1 a PReLU is max(x, a x), two cheap integer operations. A channel with a > 1 comes to the same
by prelu_a(x) = -prelu_(1/a)(-a x), and a factor for a channel passes into the weights of the layer in front of it and
of those behind it. The network computes what it computed before.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from qface.models.layers import ChannelAffine
from qface.quantization.layers import layer_of

__all__ = ["flatten_slopes", "one_slope_per_channel"]

Scalable = nn.Conv2d | nn.Linear | ChannelAffine
"""Layers into which a factor for each channel passes, on either side."""


def one_slope_per_channel(layer: nn.PReLU, channels: int) -> None:
    """Give ``layer``, in place, a slope for each of ``channels``."""
    if layer.num_parameters == 1:
        layer.num_parameters = channels
        layer.weight = nn.Parameter(layer.weight.detach().repeat(channels))


def flatten_slopes(node: fx.Node) -> None:
    """Bring the slopes of the PReLU that ``node`` calls to at most 1, in place, where its neighbours allow it."""
    layer = cast(nn.PReLU, layer_of(node))
    producer = cast(fx.Node, node.args[0])
    before, readers = layer_of(producer), [layer_of(reader) for reader in node.users]
    if len(producer.users) > 1 or not all(isinstance(neighbour, Scalable) for neighbour in (before, *readers)):
        return
    slopes = layer.weight.detach()
    steep = slopes > 1
    one = torch.ones_like(slopes)
    _scale_outputs(cast(Scalable, before), torch.where(steep, -slopes, one))
    layer.weight = nn.Parameter(torch.where(steep, 1 / slopes, slopes))
    for reader in readers:
        _scale_inputs(cast(Scalable, reader), torch.where(steep, -one, one))


def _scale_outputs(layer: Scalable, factor: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * factor.view(-1, *(1,) * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() * factor)


def _scale_inputs(layer: Scalable, factor: Tensor) -> None:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        grouped = weight.view(layer.groups, -1, *weight.shape[1:])  # [groups, outputs, inputs, height, width]
        weight = (grouped * factor.view(layer.groups, 1, -1, 1, 1)).view_as(weight)
    else:
        weight = weight * factor
    layer.weight = nn.Parameter(weight)
