"""Residual sums keep 8 bits where the convolutions beside them have fewer.

A residual connection carries the sum of all earlier blocks. If it had the few bits of the convolution that consumes the
same tensor, every block would round that sum again. So the residual sum consumes an 8-bit tensor, and the convolution
consumes a copy with its own bits.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import fx, nn

from qface.graph.edit import insert_layer
from qface.graph.layers import Add, ChannelAffine
from qface.graph.queries import input_of, is_clamp, layer_of, shape_of
from qface.quantization.quantization_config import QuantizationConfig

__all__ = ["widen_residuals"]

_WITH_CHANNELS = (2, 4)  # numbers of dimensions of tensors with a channel dimension


def widen_residuals(network: fx.GraphModule, config: QuantizationConfig, wide: int) -> None:
    """Insert copies of residual tensors for layers with fewer than ``wide`` bits, in place.

    Such convolutions and linear layers consume the copy instead of the tensor. The copy of a sum is a second sum, that
    of any other tensor an identity :class:`~qface.graph.layers.ChannelAffine`; both have integer kernels. The network's
    output does not change.

    Args:
        network: canonical float network.
        config: activation bits of each layer.
        wide: bits of the inputs of residual sums.
    """
    for node in list(network.graph.nodes):
        consumers = [user for user in node.users if _is_quantized_matmul(user, config)]
        summed = any(isinstance(layer_of(user), Add) for user in node.users)
        narrow = any(config.activation_bits_of(str(consumer.target)) < wide for consumer in consumers)
        if summed and narrow and _can_be_copied(node):
            _split(network, node, consumers)
    network.recompile()


def _is_quantized_matmul(node: fx.Node, config: QuantizationConfig) -> bool:
    return isinstance(layer_of(node), (nn.Conv2d, nn.Linear)) and not config.ignores(str(node.target))


def _can_be_copied(node: fx.Node) -> bool:
    """Return True for sums and other tensors with channels, except the image, which always has 8 bits."""
    return isinstance(layer_of(node), Add) or (node.op != "placeholder" and len(shape_of(node)) in _WITH_CHANNELS)


def _split(network: fx.GraphModule, node: fx.Node, consumers: list[fx.Node]) -> None:
    narrow = _copy(network, node)
    for consumer in consumers:
        consumer.replace_input_with(node, narrow)


def _copy(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Insert a node after ``node`` that computes the same value."""
    layer, name = layer_of(node), f"{node.name}_narrow"
    if isinstance(layer, Add):
        # Swapped inputs: onnxruntime merges two identical sums, and has no integer kernel for the result.
        return _after(network, node, Add(), node.args[::-1], name)
    if is_clamp(node) and isinstance(layer_of(input_of(node)), Add) and len(input_of(node).users) == 1:
        total = _after(network, node, Add(), input_of(node).args[::-1], f"{name}_sum")
        return _after(network, total, copy.deepcopy(cast(nn.Module, layer)), (total,), name)
    device = next(parameter.device for parameter in network.parameters())
    return _after(network, node, ChannelAffine(shape_of(node)[1]).to(device), (node,), name)


def _after(network: fx.GraphModule, node: fx.Node, layer: nn.Module, inputs: Any, name: str) -> fx.Node:
    inserted = insert_layer(network, layer, inputs, name, node.next)
    inserted.meta = dict(node.meta)
    return inserted
