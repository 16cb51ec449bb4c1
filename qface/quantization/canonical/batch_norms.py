"""BatchNorm as a part of the layer in front of it, or as a scale and shift of its own."""

from __future__ import annotations

from torch import fx, nn

from qface.errors import UnsupportedLayerError
from qface.models.layers import ChannelAffine, batch_norm_affine
from qface.quantization.canonical.graph_edit import set_layer, shape_of
from qface.quantization.quantized_layers import layer_of

__all__ = ["fold_batch_norms"]


def fold_batch_norms(graph_module: fx.GraphModule) -> None:
    """Multiply each norm into the layer in front of it, or make it a :class:`ChannelAffine` where there is none.

    Raises:
        UnsupportedLayerError: a norm has no running statistics; it is named.
    """
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            continue
        if layer.running_mean is None:
            raise UnsupportedLayerError(
                f"{node.target!r} is a BatchNorm without running statistics, which has no fixed form to quantize; "
                "build it with track_running_stats=True and estimate them"
            )
        producer = node.args[0]
        previous = layer_of(producer)
        if isinstance(previous, (nn.Conv2d, nn.Linear)) and _makes_channels(producer) and len(producer.users) == 1:
            _fold(previous, layer)
            node.replace_all_uses_with(producer)
            graph_module.graph.erase_node(node)
        else:
            set_layer(graph_module, node.target, ChannelAffine.from_batch_norm(layer).to(layer.running_mean.device))


def _makes_channels(node: fx.Node) -> bool:
    """Whether what the layer of ``node`` makes lies along dimension 1, which is what a norm behind it scales."""
    return isinstance(layer_of(node), nn.Conv2d) or len(shape_of(node)) == 2


def _fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Multiply the norm into the layer in front of it, in float64."""
    scale, shift = batch_norm_affine(norm)
    weight = layer.weight.detach().double() * scale.view(-1, *(1,) * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
