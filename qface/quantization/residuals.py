"""Residual connections keep their bits where convolutions read fewer.

A sum hands on what it reads. If a convolution's few bits counted for it too, each block would round what all blocks
before have added up. So the sum reads bytes, and the convolution beside it a value of its own, which has its bits.
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

_WITH_CHANNELS = (2, 4)  # dimensions


def widen_residuals(network: fx.GraphModule, config: QuantizationConfig, wide: int) -> None:
    """Let convolutions and linear layers of fewer than ``wide`` bits read a value of their own beside a sum; in place.

    Of a sum that is a second sum, and otherwise a :class:`~qface.graph.layers.ChannelAffine` that changes nothing.
    Both have integer kernels, and the network computes what it did.

    Args:
        network: canonical, in float.
        config: bits of what each layer reads.
        wide: bits of what a sum reads otherwise.
    """
    for node in list(network.graph.nodes):
        readers = [user for user in node.users if _multiplies_integers(user, config)]
        summed = any(isinstance(layer_of(user), Add) for user in node.users)
        narrow = any(config.activation_bits_of(str(reader.target)) < wide for reader in readers)
        if summed and narrow and _can_be_made_again(node):
            _read_apart(network, node, readers)
    network.recompile()


def _multiplies_integers(node: fx.Node, config: QuantizationConfig) -> bool:
    return isinstance(layer_of(node), (nn.Conv2d, nn.Linear)) and not config.ignores(str(node.target))


def _can_be_made_again(node: fx.Node) -> bool:
    """A sum, and what else has channels, save the image, which has bits of its own."""
    return isinstance(layer_of(node), Add) or (node.op != "placeholder" and len(shape_of(node)) in _WITH_CHANNELS)


def _read_apart(network: fx.GraphModule, node: fx.Node, readers: list[fx.Node]) -> None:
    narrow = _same_again(network, node)
    for reader in readers:
        reader.replace_input_with(node, narrow)


def _same_again(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Another node, right after ``node``, that makes the same value."""
    layer, name = layer_of(node), f"{node.name}_narrow"
    if isinstance(layer, Add):
        # The other way round: onnxruntime makes one of two sums that are alike, and has no integer kernel for that.
        return _after(network, node, Add(), node.args[::-1], name)
    if is_clamp(node) and isinstance(layer_of(input_of(node)), Add) and len(input_of(node).users) == 1:
        total = _after(network, node, Add(), input_of(node).args[::-1], f"{name}_sum")
        return _after(network, total, copy.deepcopy(cast(nn.Module, layer)), (total,), name)
    device = next(parameter.device for parameter in network.parameters())
    return _after(network, node, ChannelAffine(shape_of(node)[1]).to(device), (node,), name)


def _after(network: fx.GraphModule, node: fx.Node, layer: nn.Module, inputs: Any, name: str) -> fx.Node:
    made = insert_layer(network, layer, inputs, name, node.next)
    made.meta = dict(node.meta)
    return made
