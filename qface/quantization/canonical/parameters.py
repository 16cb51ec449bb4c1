"""Parameters: plain ones, each of one layer that is called once, and none that cannot be quantized."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import fx, nn

from qface.errors import TraceError, UnsupportedLayerError, one_line
from qface.models.layers import ChannelAffine
from qface.quantization.canonical.graph_edit import add_layer
from qface.quantization.quantized_layers import layer_of

__all__ = ["copied_with_plain_parameters", "own_layer_per_call", "own_parameters", "refuse_unknown_weights"]

_SUPPORTED_WEIGHTS = (nn.Conv2d, nn.Linear, nn.PReLU, ChannelAffine, nn.BatchNorm1d, nn.BatchNorm2d)
_PRODUCTS_OF_FUNCTIONS = (F.conv2d, F.linear, torch.matmul, operator.matmul, torch.bmm)


def copied_with_plain_parameters(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose weights are plain parameters: what parametrizations compute is written into them."""
    try:
        copied = copy.deepcopy(graph_module)
    except RuntimeError as error:
        raise TraceError(
            f"the network cannot be copied ({one_line(error, 200)}): undo torch.nn.utils.weight_norm and prune with "
            "remove_weight_norm and prune.remove first"
        ) from error
    for layer in list(copied.modules()):
        if parametrize.is_parametrized(layer):
            _make_plain(layer)
    return copied


def _make_plain(layer: nn.Module) -> None:
    """As ``remove_parametrizations``, which would break the layer that this one is a copy of: they share a class."""
    values = {name: getattr(layer, name).detach() for name in layer.parametrizations}  # type: ignore[union-attr]
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value))


def own_layer_per_call(graph_module: fx.GraphModule) -> None:
    """Give each call of a shared layer a copy of its own, since each needs ranges and foldings of its own."""
    seen: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = graph_module.get_submodule(node.target)
        calls = seen[id(layer)] = seen.get(id(layer), 0) + 1
        if calls > 1:
            node.target = add_layer(graph_module, f"{node.target}_call{calls}", copy.deepcopy(layer))


def own_parameters(graph_module: fx.GraphModule) -> None:
    """Give each layer parameters of its own, where layers share them: each is folded, equalized and rounded alone."""
    seen: set[int] = set()
    for layer in graph_module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))


def refuse_unknown_weights(graph_module: fx.GraphModule) -> None:
    """Name what has weights that cannot be quantized.

    Raises:
        UnsupportedLayerError: there is something of that kind.
    """
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            _check_layer(str(node.target), layer)
        elif node.op == "call_function" and node.target in _PRODUCTS_OF_FUNCTIONS:
            raise UnsupportedLayerError(
                f"node {node.name!r} multiplies by a function call, which has no layer to quantize; "
                "use nn.Conv2d or nn.Linear"
            )


def _check_layer(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, _SUPPORTED_WEIGHTS) and any(p.ndim > 1 for p in layer.parameters()):
        raise UnsupportedLayerError(
            f"layer {name!r} is a {type(layer).__name__}, whose weights qface cannot quantize; "
            "it takes Conv2d, Linear, PReLU and BatchNorm"
        )
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and "weight" not in layer._parameters:
        raise UnsupportedLayerError(
            f"layer {name!r} computes its weight when it is called, as torch.nn.utils.spectral_norm does; "
            "write the weight into it first, as with remove_spectral_norm"
        )
