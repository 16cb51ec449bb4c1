"""Folding of BatchNorms and constant scales and shifts into the layer before them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from qface.graph.edit import bypass, set_layer
from qface.graph.layers import ChannelAffine, Reshape, batch_norm_affine
from qface.graph.queries import input_of, layer_of, shape_of

__all__ = ["fold_affine_maps"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_affine_maps(graph_module: fx.GraphModule) -> None:
    """Fold each BatchNorm and :class:`ChannelAffine` into the layer before it if possible.

    Other BatchNorms and scalar maps become a ChannelAffine with one value per channel.
    """
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if not isinstance(layer, (*_NORMS, ChannelAffine)):
            continue
        producer = _producer_of(node, layer)
        scale, shift = _affine_of(layer)
        if len(producer.users) == 1 and _takes(producer, node, layer):
            _fold(layer_of(producer), scale, shift)
            bypass(node, input_of(node))
        else:
            _stand_alone(graph_module, node, layer)


def _affine_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift in float64, [1] or [channels]."""
    if isinstance(layer, _NORMS):
        return batch_norm_affine(layer)
    affine = cast(ChannelAffine, layer)
    return affine.weight.detach().double(), affine.bias.detach().double()


def _producer_of(node: fx.Node, layer: nn.Module) -> fx.Node:
    """Return the producer of the input of ``node``, before reshapes that keep the scaled channels."""
    producer = input_of(node)
    while isinstance(layer_of(producer), (Reshape, nn.Flatten)) and len(producer.users) == 1:
        source = input_of(producer)
        if not _is_scalar(layer) and not _keeps_last(source, producer, _channels_of(node, layer)):
            break
        producer = source
    return producer


def _keeps_last(source: fx.Node, reshaped: fx.Node, channels: int) -> bool:
    """True if ``channels`` is the last dimension after a reshape that does not change the last size."""
    before, after = shape_of(source), shape_of(reshaped)
    return channels == len(after) - 1 and before[-1:] == after[-1:]


def _channels_of(node: fx.Node, layer: nn.Module) -> int:
    """Return the dimension along which ``layer`` scales."""
    return int(getattr(layer, "dim", 1)) % len(shape_of(node))


def _takes(producer: fx.Node, node: fx.Node, layer: nn.Module) -> bool:
    """True if ``layer`` scales the output channels of the layer of ``producer``."""
    previous = layer_of(producer)
    rank = len(shape_of(producer))
    if isinstance(previous, nn.Conv2d):
        channels = 1
    elif isinstance(previous, nn.Linear):
        channels = rank - 1
    elif isinstance(previous, ChannelAffine):
        same = producer is input_of(node) and _channels_of(node, layer) == previous.dim
        return isinstance(layer, ChannelAffine) and (same or _is_scalar(layer))
    else:
        return False
    if _is_scalar(layer):
        return True
    if producer is not input_of(node):
        return channels == rank - 1
    return _channels_of(node, layer) == channels


def _is_scalar(layer: nn.Module) -> bool:
    return isinstance(layer, ChannelAffine) and layer.num_channels == 1


def _fold(layer: nn.Module | None, scale: Tensor, shift: Tensor) -> None:
    """Fold scale and shift into the weight and bias of ``layer``, in float64."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear, ChannelAffine))
    weight = layer.weight.detach().double() * scale.view(-1, *(1,) * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.expand(len(weight)).to(layer.weight.dtype).contiguous())
    if isinstance(layer, ChannelAffine):
        layer.num_channels = len(weight)


def _stand_alone(graph_module: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    if isinstance(layer, _NORMS):
        device = cast(Tensor, layer.running_mean).device
        set_layer(graph_module, str(node.target), ChannelAffine.from_batch_norm(layer).to(device))
    elif isinstance(layer, ChannelAffine) and layer.num_channels == 1 and len(shape_of(node)) in (2, 4):
        channels = shape_of(node)[1]
        layer.num_channels = channels
        with torch.no_grad():
            layer.weight = nn.Parameter(layer.weight.expand(channels).clone())
            layer.bias = nn.Parameter(layer.bias.expand(channels).clone())
