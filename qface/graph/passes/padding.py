"""Folding of zero padding into the convolution after it, which is a kernel with padding in any case."""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from qface.graph.edit import bypass
from qface.graph.layers import Pad
from qface.graph.queries import input_of, layer_of

__all__ = ["fold_padding"]


def fold_padding(graph_module: fx.GraphModule) -> None:
    """Remove each even zero padding that only convolutions read, which then pad themselves."""
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if not isinstance(layer, Pad) or layer.mode != "constant" or len(layer.padding) > 4:
            continue
        left, right, top, bottom = layer.padding
        readers = [layer_of(user) for user in node.users]
        convolutions = [reader for reader in readers if isinstance(reader, nn.Conv2d) and _pads_with_zeros(reader)]
        if (left, top) != (right, bottom) or not readers or len(convolutions) < len(readers):
            continue
        for convolution in convolutions:
            rows, columns = cast(tuple[int, int], convolution.padding)
            convolution.padding = (rows + top, columns + left)
        bypass(node, input_of(node))


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
