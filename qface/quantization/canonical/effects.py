"""Operations in place, and those without effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from qface.quantization.canonical.graph_edit import inputs_of
from qface.quantization.quantized_layers import layer_of

__all__ = ["remove_clones", "remove_no_operations", "undo_in_place"]

_NO_OPERATION = (nn.Dropout, nn.Dropout2d, nn.Identity)
_ALIASES = frozenset({"contiguous", "detach", "float"})
"""Methods that give the tensor itself, or one that shares its memory, where a network is called in float32."""


def undo_in_place(graph_module: fx.GraphModule) -> None:
    """Let those that read a value after an operation overwrote it read the result, so that nothing is overwritten."""
    place = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        if _overwrites(graph_module, node):
            later = {user for user in inputs_of(node)[0].users if place[user] > place[node]}
            inputs_of(node)[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _overwrites(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    layer = layer_of(node)
    if layer is not None:
        in_place = getattr(layer, "inplace", False)
        if in_place:
            layer.inplace = False  # type: ignore[assignment]
        return bool(in_place)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return bool(node.kwargs.get("inplace"))


def remove_no_operations(graph_module: fx.GraphModule) -> None:
    """Take out what gives its input in eval mode: dropout, identities, and methods that share its memory."""
    _remove(graph_module, _gives_its_input)


def remove_clones(graph_module: fx.GraphModule) -> None:
    """Take out copies, which only operations in place had need of."""
    _remove(graph_module, _clones)


def _remove(graph_module: fx.GraphModule, has_no_effect: Callable[[fx.Node], bool]) -> None:
    for node in list(graph_module.graph.nodes):
        if has_no_effect(node):
            node.replace_all_uses_with(inputs_of(node)[0])
            graph_module.graph.erase_node(node)


def _gives_its_input(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(layer_of(node), _NO_OPERATION)
    if node.op == "call_function":
        return node.target in (F.dropout, F.dropout2d)
    return node.op == "call_method" and node.target in _ALIASES


def _clones(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "clone") or node.target is torch.clone
