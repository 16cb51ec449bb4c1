"""Batches on their way through a network, which stop before each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, fx

__all__ = ["LayerWalk"]


class LayerWalk:
    """Batches on their way through a network.

    Between two stops, one batch after the other runs through the nodes in between, and only the values that later nodes
    read are kept.

    Args:
        network: a graph with one input, in eval mode.
        batches: its inputs, one tensor per batch.

    Attributes:
        network: the network.
    """

    def __init__(self, network: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.network = network
        self._interpreter = fx.Interpreter(network)
        first, *self._left = network.graph.nodes
        self._last_reader = {used: node for node in network.graph.nodes for used in node.all_input_nodes}
        self._values: list[dict[fx.Node, Any]] = [{first: batch} for batch in batches]

    def advance_to(self, name: str) -> None:
        """Run all nodes before the one called ``name`` that did not run yet."""
        segment = list(takewhile(lambda node: node.name != name, self._left))
        self._left = self._left[len(segment) :]
        for values in self._values:
            for node in segment:
                self._run(node, values)

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        self._interpreter.env = values
        values[node] = self._interpreter.run_node(node)
        for each in (*node.all_input_nodes, node):
            if self._last_reader.get(each, node) is node:
                del values[each]

    def arguments(self) -> list[tuple[Any, ...]]:
        """Return the arguments of the next node, for each batch."""
        found = []
        for values in self._values:
            self._interpreter.env = values
            found.append(self._interpreter.fetch_args_kwargs_from_env(self._left[0])[0])
        return found

    def values(self, name: str) -> list[Any]:
        """Return the values of the node called ``name``, for each batch; none if it has not run or no node reads it."""
        return [value for values in self._values for node, value in values.items() if node.name == name]

    def num_bytes(self) -> int:
        """Return the memory of all values that are kept."""
        tensors = (value for values in self._values for value in values.values() if isinstance(value, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
