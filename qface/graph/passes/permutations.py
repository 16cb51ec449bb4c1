"""Move permutations behind elementwise layers, so that a network with channels last computes with channels first.

TensorFlow keeps channels last, and its files permute before and after each convolution. Most of these permutations
cancel once nothing is left between them. What remains has its channels in dimension 1, where integer kernels and the
other passes expect them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import fx, nn

from qface.graph.edit import bypass, insert_layer, set_layer
from qface.graph.layers import Add, ChannelAffine, Concat, Maximum, Multiply, Pad, Permute
from qface.graph.queries import input_of, layer_of

__all__ = ["move_permutations"]

_ATEN = torch.ops.aten
_ELEMENTWISE = (
    *(nn.ReLU, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.SiLU, nn.GELU, nn.ELU, nn.Mish, nn.Tanh),
    *(nn.LeakyReLU, nn.Identity, Add, Multiply, Maximum),
)
_ELEMENTWISE_FUNCTIONS = frozenset(
    (_ATEN.abs.default, _ATEN.sub.Tensor, _ATEN.minimum.default, _ATEN.maximum.default, _ATEN.pow.Tensor_Scalar)
)
_Dims = tuple[int, ...]


def move_permutations(graph_module: fx.GraphModule) -> None:
    """Compute before a permutation whatever can be computed there, and merge or remove permutations."""
    for node in list(graph_module.graph.nodes):
        if isinstance(layer_of(node), Permute):
            _merge(graph_module, node)
            continue
        dims = _permutation_of_inputs(node)
        move = None if dims is None else _rule_for(node)
        if move is not None and dims is not None and all(map(_can_move, node.all_input_nodes)):
            move(graph_module, node, dims)
    graph_module.graph.eliminate_dead_code()


def _merge(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Merge a permutation with the one before it, and remove it if nothing is permuted."""
    dims = _dims_of(node)
    before = input_of(node)
    if isinstance(layer_of(before), Permute):
        dims = tuple(_dims_of(before)[dim] for dim in dims)
        set_layer(graph_module, str(node.target), Permute(dims))
        node.replace_input_with(before, input_of(before))
    if dims == tuple(range(len(dims))):
        bypass(node, input_of(node))


def _dims_of(node: fx.Node) -> _Dims:
    layer = layer_of(node)
    assert isinstance(layer, Permute)
    return layer.dims


def _permutation_of_inputs(node: fx.Node) -> _Dims | None:
    """Return the permutation that all inputs of ``node`` share, or None."""
    inputs = node.all_input_nodes
    if not inputs or not all(isinstance(layer_of(each), Permute) for each in inputs):
        return None
    found = {_dims_of(each) for each in inputs}
    return found.pop() if len(found) == 1 else None


def _can_move(permutation: fx.Node) -> bool:
    """Return True if no consumer needs the permuted values; otherwise moving would add a permutation."""
    return all(isinstance(layer_of(user), Permute) or _rule_for(user) is not None for user in permutation.users)


_Rule = Callable[[fx.GraphModule, fx.Node, _Dims], None]


def _rule_for(node: fx.Node) -> _Rule | None:
    layer = layer_of(node)
    if isinstance(layer, _ELEMENTWISE) or (node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS):
        return _move_elementwise
    if isinstance(layer, (ChannelAffine, Concat)):
        return _move_along_dimension
    if _is_zero_padding(node):
        return _move_padding
    if node.op == "call_function" and node.target is _ATEN.mean.dim:
        return _move_mean
    return None


def _move_elementwise(graph_module: fx.GraphModule, node: fx.Node, dims: _Dims) -> None:
    for permutation in node.all_input_nodes:
        node.replace_input_with(permutation, input_of(permutation))
    _permute_after(graph_module, node, dims)


def _move_along_dimension(graph_module: fx.GraphModule, node: fx.Node, dims: _Dims) -> None:
    layer = layer_of(node)
    assert isinstance(layer, (ChannelAffine, Concat))
    if isinstance(layer, Concat) or layer.num_channels > 1:
        layer.dim = dims[layer.dim % len(dims)]
    _move_elementwise(graph_module, node, dims)


def _move_padding(graph_module: fx.GraphModule, node: fx.Node, dims: _Dims) -> None:
    """Pad channels, height and width by a :class:`Pad`, which has an integer form; other padding stays."""
    pads = [(0, 0)] * len(dims)
    given = _padding_of(node)
    for position, (before, after) in enumerate(zip(given[::2], given[1::2], strict=True)):
        pads[dims[len(dims) - 1 - position]] = (before, after)
    if len(dims) != 4 or any(pads[0]) or min(map(min, pads)) < 0:
        return
    layer = Pad((*pads[3], *pads[2], *pads[1]))
    padded = insert_layer(graph_module, layer, (input_of(input_of(node)),), node.name, node)
    bypass(node, _permute_after(graph_module, padded, dims))


def _padding_of(node: fx.Node) -> Sequence[int]:
    """Return the padding before and after each dimension, the last dimension first."""
    layer = layer_of(node)
    return layer.padding if isinstance(layer, Pad) else cast(list[int], node.args[1])


def _is_zero_padding(node: fx.Node) -> bool:
    layer = layer_of(node)
    if isinstance(layer, Pad):
        return layer.mode == "constant"
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target is _ATEN.constant_pad_nd.default:
        return not any(node.args[2:])
    return node.target is _ATEN.pad.default and node.args[2:3] in ((), ("constant",)) and not any(node.args[3:])


def _move_mean(graph_module: fx.GraphModule, node: fx.Node, dims: _Dims) -> None:
    """Replace the mean of height and width by an average pool; other means stay."""
    axes, keep = cast(list[int], node.args[1]), any(node.args[2:])
    if len(dims) != 4 or {dims[axis % len(dims)] for axis in axes} != {2, 3}:
        return
    pooled = insert_layer(graph_module, nn.AdaptiveAvgPool2d(1), (input_of(input_of(node)),), node.name, node)
    if keep:
        bypass(node, _permute_after(graph_module, pooled, dims))
    else:
        bypass(node, insert_layer(graph_module, nn.Flatten(1), (pooled,), f"{node.name}_flatten", node))


def _permute_after(graph_module: fx.GraphModule, node: fx.Node, dims: _Dims) -> fx.Node:
    """Permute the output of ``node`` for all of its consumers, and return the permutation."""
    permuted = insert_layer(graph_module, Permute(dims), (node,), f"{node.name}_permuted", node.next)
    node.replace_all_uses_with(permuted, delete_user_cb=lambda user: user is not permuted)
    return permuted
