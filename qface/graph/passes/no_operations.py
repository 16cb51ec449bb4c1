"""Removal of layers that do nothing in eval mode."""

from __future__ import annotations

from torch import fx, nn

from qface.graph.edit import bypass
from qface.graph.queries import input_of, layer_of

__all__ = ["remove_no_operations"]

_NO_OPERATION = (nn.Dropout, nn.Dropout2d, nn.Identity)


def remove_no_operations(graph_module: fx.GraphModule) -> None:
    """Remove dropout and identity layers."""
    for node in list(graph_module.graph.nodes):
        if isinstance(layer_of(node), _NO_OPERATION):
            bypass(node, input_of(node))
