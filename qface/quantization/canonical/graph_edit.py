"""What the steps toward canonical form read of a graph, and how they change it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qface.errors import TraceError, one_line

__all__ = ["Inputs", "add_layer", "argument_of", "inputs_of", "propagate_shapes", "set_layer", "shape_of"]

Inputs = tuple[fx.Node, ...]


def add_layer(graph_module: fx.GraphModule, name: str, layer: nn.Module) -> str:
    """Put ``layer`` into ``graph_module`` under ``name``, or that with a number where it is taken; the name it got."""
    free = name
    suffix = 1
    while _exists(graph_module, free):
        suffix += 1
        free = f"{name}_{suffix}"
    graph_module.add_submodule(free, layer)
    return free


def _exists(graph_module: fx.GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return hasattr(graph_module.get_submodule(owner), name)


def set_layer(graph_module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the one at ``path``."""
    graph_module.add_submodule(path, layer.train(graph_module.training))


def propagate_shapes(graph_module: fx.GraphModule, images: Tensor) -> None:
    """Run the network once, so that :func:`shape_of` knows the shape of each value.

    Raises:
        TraceError: it does not run on ``images``.
    """
    training = graph_module.training
    try:
        with torch.no_grad():
            ShapeProp(graph_module.eval()).propagate(images)
    except Exception as error:  # the user's own code runs here
        shape = "x".join(str(side) for side in images.shape[1:])
        raise TraceError(
            f"the network does not run on an image of {shape}: {one_line(error, 200)}; "
            "attach the Preprocessing with the size it reads"
        ) from error
    graph_module.train(training)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` produces for a batch of two, or () where it produces none."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


def argument_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a call is given at ``position`` or by ``name``."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def inputs_of(node: fx.Node) -> Inputs:
    """The one value that an operation on a tensor reads, as the arguments of a layer."""
    return (cast(fx.Node, argument_of(node, 0, "input")),)
