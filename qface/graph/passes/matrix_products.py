"""Conversion of convolutions over complete maps and linear layers on tokens to linear layers on rows."""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from qface.graph.edit import bypass, insert_layer, set_layer
from qface.graph.layers import Reshape
from qface.graph.queries import input_of, layer_of, makes_rows, shape_of

__all__ = ["convolutions_to_linear_layers", "tokens_to_rows"]


def convolutions_to_linear_layers(graph_module: fx.GraphModule) -> None:
    """Replace each convolution over a complete map, if a Flatten follows, by a linear layer.

    As the last layer of a network, whose output stays float, only a linear layer has an integer kernel.
    """
    for node in list(graph_module.graph.nodes):
        if _covers_its_input(node) and all(makes_rows(user) for user in node.users):
            set_layer(graph_module, str(node.target), _as_linear(cast(nn.Conv2d, layer_of(node))))
            flat = insert_layer(graph_module, nn.Flatten(1), node.all_input_nodes, f"{node.name}_input", node)
            node.args = (flat,)
            for user in list(node.users):
                node.meta = dict(user.meta)
                bypass(user, node)


def _covers_its_input(node: fx.Node) -> bool:
    layer = layer_of(node)
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.dilation != (1, 1):
        return False
    return layer.padding in ("valid", (0, 0)) and layer.kernel_size == shape_of(input_of(node))[2:]


def _as_linear(layer: nn.Conv2d) -> nn.Linear:
    weight = layer.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], len(weight), layer.bias is not None, weight.device, weight.dtype)
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach())
    return linear


def tokens_to_rows(graph_module: fx.GraphModule) -> None:
    """Reshape inputs [N, ..., features] of linear layers to [M, features] for their integer kernel."""
    for node in list(graph_module.graph.nodes):
        layer, shape = layer_of(node), shape_of(node)
        if isinstance(layer, nn.Linear) and len(shape) > 2:
            rows = Reshape((-1, layer.in_features))
            node.args = (insert_layer(graph_module, rows, (input_of(node),), f"{node.name}_rows", node),)
            after = node.next
            tokens = insert_layer(graph_module, Reshape((-1, *shape[1:])), (node,), f"{node.name}_tokens", after)
            node.replace_all_uses_with(tokens, delete_user_cb=lambda user, tokens=tokens: user is not tokens)
