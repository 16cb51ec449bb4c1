"""Batch-dependent arguments of networks that compute with the batch size in Python.

torch.export records such sizes as constants. The network is therefore exported for two and for three images. Numbers
that differ in proportion to the batch size are multiples of it; everything else must be equal in both programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qface.errors import TraceError
from qface.graph.places import place_of

__all__ = ["EXPORTED_BATCHES", "BatchDependent", "BatchMultiple", "compare_batches"]

EXPORTED_BATCHES = (2, 3)
"""Batch sizes of the two programs that :func:`compare_batches` compares."""


@dataclass(frozen=True)
class BatchMultiple:
    """``factor`` times the batch size."""

    factor: int


BatchDependent = dict[fx.Node, tuple[Any, Any]]
"""Arguments and keyword arguments of nodes, with a :class:`BatchMultiple` for each number that depends on the batch."""


@dataclass(frozen=True)
class _Described:
    """Shape and kind of a tensor, with None for sizes that depend on the batch size."""

    shape: tuple[int | None, ...]
    floating_point: bool

    def is_floating_point(self) -> bool:
        return self.floating_point


def compare_batches(first: ExportedProgram, second: ExportedProgram) -> BatchDependent:
    """Find the arguments in ``first`` that depend on the batch size.

    Shapes in the metadata of ``first`` get None for sizes that depend on the batch size.

    Args:
        first: the program for two images.
        second: the program of the same network for three images.

    Raises:
        TraceError: the programs differ in something else.
    """
    pairs = list(_pairs(first.graph_module, second.graph_module))
    twins = dict(pairs)
    found: BatchDependent = {}
    for one, other in pairs:
        if one.op != other.op or (one.op == "call_function" and one.target is not other.target):
            raise _different(one)
        if one.op != "output" and one.op != "placeholder":
            merge = _Merge(one, twins)
            arguments = (merge(one.args, other.args), merge(dict(one.kwargs), dict(other.kwargs)))
            if merge.found:
                found[one] = arguments
    for one, other in pairs:
        if "val" in one.meta:
            one.meta["val"] = _described(one.meta["val"], other.meta["val"], one)
    return found


def _pairs(first: torch.nn.Module, second: torch.nn.Module) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield corresponding nodes of both programs, including those of subgraphs."""
    bodies = [[each for each in module.modules() if isinstance(each, fx.GraphModule)] for module in (first, second)]
    if len(bodies[0]) != len(bodies[1]):
        raise _different(None)
    for one, other in zip(*bodies, strict=True):
        if len(one.graph.nodes) != len(other.graph.nodes):
            raise _different(None)
        yield from zip(one.graph.nodes, other.graph.nodes, strict=True)


class _Merge:
    """Merge the arguments of a node in both programs."""

    def __init__(self, node: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
        self.node = node
        self.twins = twins
        self.found = False

    def __call__(self, one: Any, other: Any) -> Any:
        """Return the argument of the first program, with a :class:`BatchMultiple` where both programs differ."""
        if isinstance(one, fx.Node):
            if self.twins[one] is not other:
                raise _different(self.node)
            return one
        if isinstance(one, (list, tuple)) and len(one) == len(other):
            return type(one)(self(*both) for both in zip(one, other, strict=True))
        if isinstance(one, dict) and one.keys() == other.keys():
            return {name: self(value, other[name]) for name, value in one.items()}
        if one == other:
            return one
        factor = _factor(one, other)
        if factor is None:
            raise _different(self.node)
        self.found = True
        return BatchMultiple(factor)


def _factor(one: Any, other: Any) -> int | None:
    """Return the factor by which both numbers are multiples of the batch sizes; None if they are not."""
    if type(one) is not int or type(other) is not int:
        return None
    factor, rest = divmod(one, EXPORTED_BATCHES[0])
    return factor if not rest and factor * EXPORTED_BATCHES[1] == other else None


def _described(one: Any, other: Any, node: fx.Node) -> Any:
    if isinstance(one, (list, tuple)):
        return type(one)(_described(*both, node) for both in zip(one, other, strict=True))
    if not isinstance(one, Tensor):
        return one
    sizes = list(zip(one.shape, other.shape, strict=True))
    if any(a != b and _factor(a, b) is None for a, b in sizes):
        raise _different(node)
    return _Described(tuple(a if a == b else None for a, b in sizes), one.is_floating_point())


def _different(node: fx.Node | None) -> TraceError:
    where = "" if node is None else f", starting at {node.name!r}{place_of(node)}"
    return TraceError(f"it computes something else for two images than for three{where}")
