"""The layers of a network, as tests compare them."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["kind_of", "kinds"]


def kind_of(network: fx.GraphModule, node: fx.Node) -> Any:
    """The type of the layer that ``node`` calls, or its function, or ``"get_attr"``."""
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target)))
    return node.op if node.op == "get_attr" else node.target


def kinds(network: fx.GraphModule) -> list[Any]:
    """What each node between image and output is."""
    return [kind_of(network, node) for node in network.graph.nodes if node.op not in ("placeholder", "output")]
