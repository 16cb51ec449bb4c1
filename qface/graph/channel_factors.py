"""Per-channel scaling of a layer's outputs or inputs by its weights.

Scaling the layer before an activation by s and those after it by 1 / s does not change the network's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qface.graph.layers import ChannelAffine

__all__ = ["Scalable", "scale_inputs", "scale_outputs"]

Scalable = nn.Conv2d | nn.Linear | ChannelAffine
"""Layers whose inputs and outputs can be scaled per channel."""


@torch.no_grad()
def scale_outputs(layer: Scalable, factor: Tensor) -> None:
    """Multiply the output of ``layer`` by ``factor`` [output channels], in place."""
    layer.weight.mul_(factor.view(-1, *(1,) * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factor)


@torch.no_grad()
def scale_inputs(layer: Scalable, factor: Tensor) -> None:
    """Multiply the input of ``layer`` by ``factor`` [input channels], in place."""
    if isinstance(layer, nn.Conv2d):
        # Repeats the factors of each group, since a weight in channels_last format cannot be viewed by groups.
        of_groups = factor.view(layer.groups, -1).repeat_interleave(len(layer.weight) // layer.groups, 0)
        layer.weight.mul_(of_groups[:, :, None, None])
    else:
        layer.weight.mul_(factor)
