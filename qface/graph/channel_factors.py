"""Factors for single channels that pass through a network: into the weights before an activation and those behind it.

What they multiply changes, and the network computes what it computed before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qface.graph.layers import ChannelAffine

__all__ = ["Scalable", "scale_inputs", "scale_outputs"]

Scalable = nn.Conv2d | nn.Linear | ChannelAffine
"""Layers into which a factor for each channel passes, on either side."""


@torch.no_grad()
def scale_outputs(layer: Scalable, factor: Tensor) -> None:
    """Multiply what ``layer`` makes by ``factor`` [output channels], in place."""
    layer.weight.mul_(factor.view(-1, *(1,) * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factor)


@torch.no_grad()
def scale_inputs(layer: Scalable, factor: Tensor) -> None:
    """Let ``layer`` multiply what it reads by ``factor`` [input channels], in place."""
    if isinstance(layer, nn.Conv2d):
        # Of each output channel those of its group: no view of the weight, which may lie in channels_last.
        of_groups = factor.view(layer.groups, -1).repeat_interleave(len(layer.weight) // layer.groups, 0)
        layer.weight.mul_(of_groups[:, :, None, None])
    else:
        layer.weight.mul_(factor)
