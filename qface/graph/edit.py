"""Edits of a graph of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

__all__ = ["add_layer", "bypass", "insert_layer", "propagate_shapes", "set_layer"]


def add_layer(graph_module: fx.GraphModule, name: str, layer: nn.Module) -> str:
    """Add ``layer`` under ``name``, with a number appended if it is taken, and return its name."""
    free, number = name, 1
    while _exists(graph_module, free):
        number += 1
        free = f"{name}_{number}"
    graph_module.add_submodule(free, layer.train(graph_module.training))
    return free


def _exists(graph_module: fx.GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return hasattr(graph_module.get_submodule(owner), name)


def set_layer(graph_module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """Replace the layer at ``path`` by ``layer``."""
    graph_module.add_submodule(path, layer.train(graph_module.training))


def insert_layer(
    graph_module: fx.GraphModule, layer: nn.Module, inputs: Sequence[fx.Node], name: str, before: fx.Node
) -> fx.Node:
    """Insert a call of a new ``layer`` before the node ``before``, whose metadata (shape) is copied."""
    path = add_layer(graph_module, name, layer)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.call_module(path, tuple(inputs))
    node.meta = dict(before.meta)
    return node


def bypass(node: fx.Node, value: fx.Node) -> None:
    """Redirect the consumers of ``node`` to ``value`` and erase ``node``."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def propagate_shapes(graph_module: fx.GraphModule, images: Tensor) -> None:
    """Run the network on a batch of two ``images`` to record the shape of each node for ``shape_of``."""
    training = graph_module.training
    with torch.no_grad():
        ShapeProp(graph_module.eval()).propagate(images)
    graph_module.train(training)
