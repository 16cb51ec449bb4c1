"""Convolutions that are linear layers: those over a whole map, as in front of an embedding."""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from qface.quantization.canonical.graph_edit import add_layer, inputs_of, set_layer, shape_of
from qface.quantization.quantized_layers import layer_of, makes_rows

__all__ = ["convolutions_to_linear_layers"]


def convolutions_to_linear_layers(graph_module: fx.GraphModule) -> None:
    """A convolution over a whole map that is flattened behind it is a linear layer.

    As the last layer, whose output stays float, only that has an integer kernel.
    """
    for node in list(graph_module.graph.nodes):
        if _covers_its_input(node) and all(makes_rows(user) for user in node.users):
            convolution = cast(nn.Conv2d, layer_of(node))
            set_layer(graph_module, str(node.target), _as_linear(convolution))
            flatten = add_layer(graph_module, f"{node.name}_input", nn.Flatten(1))
            with graph_module.graph.inserting_before(node):
                node.args = (graph_module.graph.call_module(flatten, node.args),)
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph_module.graph.erase_node(user)


def _covers_its_input(node: fx.Node) -> bool:
    layer = layer_of(node)
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.dilation != (1, 1):
        return False
    return layer.padding in ("valid", (0, 0)) and layer.kernel_size == shape_of(inputs_of(node)[0])[2:]


def _as_linear(layer: nn.Conv2d) -> nn.Linear:
    weight = layer.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], len(weight), layer.bias is not None, weight.device, weight.dtype)
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach())
    return linear
