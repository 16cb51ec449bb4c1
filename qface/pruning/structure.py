"""Layers that a network executes, and where their outputs go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qface.graph.capture import capture
from qface.graph.layers import Concat, Permute
from qface.graph.queries import layer_of

__all__ = ["WEIGHTED", "Structure", "is_depthwise", "structure_of"]

WEIGHTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Structure:
    """Names of the convolutions and linear layers of a network by use; pruning does not change them.

    Args:
        weighted: all executed layers.
        embedding: layers whose output channels are channels of the embedding.
        reordered: layers whose outputs are concatenated or permuted, where torch-pruning 1.6.1 confuses channels.
    """

    weighted: tuple[str, ...]
    embedding: tuple[str, ...]
    reordered: tuple[str, ...]


def structure_of(model: nn.Module) -> Structure:
    """Return the structure of ``model``.

    Raises:
        TraceError: torch.export cannot trace the model.
        UnsupportedLayerError: the model calls an unsupported operator.
    """
    graph = capture(model).graph
    layers = {node: model.get_submodule(str(node.target)) for node in graph.nodes if _has_layer(model, node)}
    weighted = {node: layer for node, layer in layers.items() if isinstance(layer, WEIGHTED)}
    found = {node: str(node.target) for node, layer in weighted.items() if not is_depthwise(layer)}
    (output,) = (node for node in graph.nodes if node.op == "output")
    reordering = [node for node in graph.nodes if isinstance(layer_of(node), _REORDERING)]
    return Structure(
        tuple(str(node.target) for node in weighted),
        tuple(_names_before(found, output, set())),
        tuple(name for node in reordering for name in _names_before(found, node, set())),
    )


_REORDERING = (Concat, Permute)


def _has_layer(model: nn.Module, node: fx.Node) -> bool:
    """True if ``node`` calls a module that also exists in ``model``."""
    if node.op != "call_module":
        return False
    at: Any = model
    for part in str(node.target).split("."):
        at = getattr(at, part, None)
    return isinstance(at, nn.Module)


def _names_before(names: dict[fx.Node, str], node: fx.Node, seen: set[fx.Node]) -> Iterator[str]:
    for source in node.all_input_nodes:
        if source in seen:
            continue
        seen.add(source)
        if source in names:
            yield names[source]
        else:
            yield from _names_before(names, source, seen)


def is_depthwise(layer: nn.Module) -> bool:
    """True if ``layer`` is a depthwise convolution with one output per input channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1
