"""Errors in the outputs of a student's layers, layer by layer, while the student is rounded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from qface.graph.layers import Add
from qface.graph.queries import layer_of
from qface.models.patches import Layer, Positions, output_size, outputs_at, patches
from qface.quantization.fake_quantize import quantizers
from qface.quantization.gptq import Statistics, statistics_for, weight_of
from qface.quantization.layer_walk import LayerWalk
from qface.quantization.quantized_layers import WeightedLayer, is_quantizer
from qface.quantization.student_modes import simulated_mode

__all__ = ["OutputErrors", "weighted_nodes"]

_MAX_BYTES = 2**32
"""Maximum memory of the activations that wait between two layers, of the student and the float network together."""


def weighted_nodes(student: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that first call each convolution or linear layer, in execution order."""
    first: dict[int, fx.Node] = {}
    for node in student.graph.nodes:
        if isinstance(layer := layer_of(node), WeightedLayer):
            first.setdefault(id(layer), node)
    return list(first.values())


class OutputErrors:
    """Calibration images on their way through a student and its float network.

    Args:
        student: with ranges, in eval mode; no layer is rounded yet, and the caller rounds them.
        batches: normalized images, float32 [N, 3, H, W] each; as many as fit into memory are used.

    Attributes:
        original: the float network, a copy of ``student`` whose quantizers are switched off.
        generator: generator of the sampled positions.
    """

    def __init__(self, student: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.original = copy.deepcopy(student)
        for quantizer in quantizers(self.original):
            quantizer.enable_fake_quant(False)
        self.generator = torch.Generator().manual_seed(0)
        batches = _affordable(self.original, batches)
        self._num_batches = len(batches)
        self._student, self._original = LayerWalk(student, batches), LayerWalk(self.original, batches)

    def observe(self, node: fx.Node) -> Statistics:
        """Return statistics of the layer that ``node`` calls.

        Args:
            node: one of :func:`weighted_nodes`; they have to come in this order, each after the layer before it is
                rounded.
        """
        layer = cast(Layer, layer_of(node))
        with simulated_mode(self._student.network):
            self._student.advance_to(node.name)
        self._original.advance_to(node.name)
        weight = weight_of(layer).float()
        statistics = statistics_for(*weight.shape)
        arguments = list(zip(self._student.arguments(), self._original.arguments(), strict=True))
        shape = cast(Any, layer).multiply(arguments[0][0][0][:1], layer.weight).shape
        size = output_size(layer, shape)
        for ((found,), (wanted,)), missing in zip(arguments, self._errors_of(_summand(node)), strict=True):
            positions = Positions.drawn(len(found), *size, statistics.wanted(len(found)), self.generator)
            inputs, wanted_inputs = (
                _by_group(patches(layer, x.cpu(), positions), len(weight)) for x in (found, wanted)
            )
            errors = (wanted_inputs - inputs) @ weight.mT
            if missing is not None and missing.shape[1:] == shape[1:]:
                errors += _by_group(outputs_at(layer, missing.cpu(), positions), len(weight))
            statistics.add(inputs, errors)
        return statistics

    def _errors_of(self, node: fx.Node | None) -> list[Tensor | None]:
        """Return what the values of ``node`` lack, for each batch; None for values that do not exist yet."""
        found = [] if node is None else self._student.values(node.name)
        if node is None or not found:
            return [None] * self._num_batches
        return [wanted - found for wanted, found in zip(self._original.values(node.name), found, strict=True)]


def _summand(node: fx.Node) -> fx.Node | None:
    """Return the node whose values are added to those of ``node``, as in a residual connection, if any."""
    users = list(node.users)
    while len(users) == 1 and is_quantizer(users[0]):
        node, users = users[0], list(users[0].users)
    others = {other for user in users for other in user.all_input_nodes if other is not node}
    sums = all(isinstance(layer_of(user), Add) for user in users)
    return others.pop() if sums and len(others) == 1 else None


def _affordable(network: fx.GraphModule, batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first of ``batches``, as many as two networks can keep between layers, at least one."""
    walk, most = LayerWalk(network, [batches[0][:1]]), 1
    for node in weighted_nodes(network):
        walk.advance_to(node.name)
        most = max(most, walk.num_bytes())
    return batches[: max(1, _MAX_BYTES // (2 * most * len(batches[0])))]


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Return ``rows`` [M, groups x K] as [groups, M, K]."""
    return rows.view(len(rows), groups, -1).transpose(0, 1)
