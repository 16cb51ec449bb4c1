"""Builder of graphs of named layers, the base of all importers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["LayerGraph"]


class LayerGraph:
    """A graph under construction: layers, functions and constants with unique names, in execution order."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self._constants: dict[int, tuple[Tensor, fx.Node]] = {}
        self._tensors: dict[fx.Node, Tensor] = {}
        self._numbers: dict[str, int] = {}

    def layer(self, layer: nn.Module, inputs: Sequence[fx.Node], name: str) -> fx.Node:
        """Add a call of ``layer`` on ``inputs`` under ``name``, with a number appended if the name is taken."""
        path = self._free_path(name)
        self._place(path, layer)
        return self.graph.call_module(path, tuple(inputs))

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        """Add a call of ``target``, a function without parameters."""
        return self.graph.create_node("call_function", target, args, kwargs, name)

    def constant(self, tensor: Tensor, name: str) -> fx.Node:
        """Return the node of ``tensor``, which is stored once under ``name``."""
        if id(tensor) not in self._constants:
            path = self._free_path(name)
            owner, last = self._owner(path)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(last, tensor)
            else:
                owner.register_buffer(last, tensor)
            made = self.graph.create_node("get_attr", path)
            self._constants[id(tensor)], self._tensors[made] = (tensor, made), tensor
        return self._constants[id(tensor)][1]

    def stored_constant(self, node: Any) -> Tensor | None:
        """Return the tensor of a node that :meth:`constant` returned, else None."""
        return self._tensors.get(node) if isinstance(node, fx.Node) else None

    def finish(self, output: fx.Node, class_name: str) -> fx.GraphModule:
        """Return a graph module in eval mode with the output ``output``, without unused nodes and layers."""
        self.graph.output(output)
        network = fx.GraphModule(self.root, self.graph, class_name=class_name).eval()
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
        return network

    def _place(self, path: str, layer: nn.Module) -> None:
        owner, last = self._owner(path)
        owner.add_module(last, layer)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        *folders, last = path.split(".")
        owner = self.root
        for folder in folders:
            if not hasattr(owner, folder):
                owner.add_module(folder, nn.Module())
            owner = owner.get_submodule(folder)
        return owner, last

    def _free_path(self, name: str) -> str:
        wanted = ".".join(re.sub(r"\W", "_", part) or "_" for part in name.split("."))
        first = self._numbers.get(wanted, 1)  # smaller numbers are taken, since nothing is ever removed
        for number in count(first):
            path = wanted if number == 1 else f"{wanted}_{number}"
            if self._is_free(path):
                self._numbers[wanted] = number
                return path
        raise AssertionError

    def _is_free(self, path: str) -> bool:
        """True if neither ``path`` nor a prefix of it names a layer or tensor."""
        at: Any = self.root
        for part in path.split("."):
            if not hasattr(at, part):
                return type(at) is nn.Module  # a plain container
            at = getattr(at, part)
        return False
