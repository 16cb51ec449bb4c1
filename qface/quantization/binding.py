"""Binding of layers to their quantizers, and of scales to the scales that they depend on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

from torch import fx, nn

from qface.graph.layers import Add, Concat, Maximum, Multiply
from qface.graph.queries import is_clamp, is_shape_only, layer_of, pair_of, source_of_values
from qface.quantization.exact_scales import (
    ExactScale,
    ExactWeightScale,
    FunctionValues,
    Scaled,
    ScaleGroup,
    ScaleRatio,
    pin_ratios,
)
from qface.quantization.fake_quantize import LSQFakeQuantize, SharedScaleFakeQuantize
from qface.quantization.quantized_layers import (
    QuantContext,
    QuantizedAffine,
    QuantizedGlobalAveragePool,
    QuantizedPReLU,
    Quantizer,
    WeightedLayer,
    is_quantizer,
)

__all__ = ["bind_quantizers", "layers_near_ties"]

_WITH_CONTEXT = (*WeightedLayer, QuantizedAffine, QuantizedPReLU)
_LINKING = (Add, Concat, Maximum)
# Maximum number of float32 roundings between input and result, over torch and all kernels.
_PRODUCT_ROUNDINGS = 6
_GLOBAL_AVERAGE_ROUNDINGS = 5
_AVERAGE_ROUNDINGS = 6


def bind_quantizers(student: fx.GraphModule) -> None:
    """Set the quantizers of each layer and the scale rule of each quantizer.

    Call it again after a change of the graph.

    Args:
        student: changed in place.
    """
    for node in student.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, _WITH_CONTEXT):
            layer.quant_context = QuantContext(tuple(_inputs(node)), _quantizer_after(node))
        elif isinstance(layer, SharedScaleFakeQuantize):
            (activation,) = node.users
            layer.share_scale_of(cast(LSQFakeQuantize, _quantizer_after(activation)))
    nodes = [node for node in student.graph.nodes if _is_integer_node(node)]
    _bind_scales(nodes)
    _bind_weight_scales(nodes)


def layers_near_ties(student: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of layers whose results may be so close to a rounding tie that processors disagree.

    These are products and averages: all scales of the layer are already constrained by other layers, or the layer
    averages too many values.

    Args:
        student: calibrated.
    """
    nodes = [node for node in student.graph.nodes if _is_integer_node(node)]
    return tuple(str(node.target) for node in nodes for ratio in _ratios(node) if not ratio.keeps_distance())


def _inputs(node: fx.Node) -> Iterator[Quantizer | None]:
    return (_quantizer_before(each) for each in node.args if isinstance(each, fx.Node))


def _quantizer_before(node: fx.Node) -> Quantizer | None:
    """Return the quantizer of the values of ``node``, looking through layers that only move values."""
    node = source_of_values(node)
    return cast(Quantizer, layer_of(node)) if is_quantizer(node) else None


def _quantizer_after(node: fx.Node) -> Quantizer | None:
    """Return the quantizer of the output of ``node``, looking through clamps."""
    users = list(node.users)
    while len(users) == 1 and is_clamp(users[0]):
        users = list(users[0].users)
    if len(users) != 1 or not is_quantizer(users[0]):
        return None
    return cast(Quantizer, layer_of(users[0]))


# ---- scales


def _is_integer_node(node: fx.Node) -> bool:
    """Return True if all inputs of ``node`` and its output are quantized.

    This is False for a clamp fused into the layer before it, whose input is not rounded yet.
    """
    if node.op != "call_module" or is_quantizer(node) or is_shape_only(node):
        return False
    # Inputs first: they are adjacent, while a chain of clamps after the layer may be long.
    return all(each is not None for each in _inputs(node)) and _quantizer_after(node) is not None


def _bind_scales(nodes: list[fx.Node]) -> None:
    groups = _groups(nodes)
    functions = {_output(node): _function(node) for node in nodes if isinstance(layer_of(node), nn.Sigmoid)}
    sources: dict[Scaled, Scaled] = {quantizer: function.source for quantizer, function in functions.items()}
    pin_ratios([ratio for node in nodes for ratio in _ratios(node)], groups, sources)
    for quantizer, group in groups.items():
        if isinstance(quantizer, LSQFakeQuantize):
            values = functions.get(quantizer)
            free = len(group.members) == 1 and group.ratio is None and values is None
            quantizer.scale_rule = None if free else ExactScale(quantizer, group, values)


def _bind_weight_scales(nodes: list[fx.Node]) -> None:
    for node in nodes:
        layer = layer_of(node)
        if isinstance(layer, (*WeightedLayer, QuantizedPReLU)):
            (source,) = _input_scales(node)
            quantizer = layer.weight_fake_quant
            quantizer.scale_rule = ExactWeightScale(quantizer, source, cast(Quantizer, _quantizer_after(node)))


def _groups(nodes: Iterable[fx.Node]) -> dict[Scaled, ScaleGroup]:
    """Return the scale group of each quantizer at an input or output of ``nodes``."""
    groups: dict[Scaled, ScaleGroup] = {}
    for node in nodes:
        scaled: list[Scaled] = list(dict.fromkeys((*_input_scales(node), _output(node))))
        for each in scaled:
            groups.setdefault(each, ScaleGroup([each]))
        if isinstance(layer_of(node), _LINKING) or is_clamp(node):
            joined = ScaleGroup(list(dict.fromkeys(member for each in scaled for member in groups[each].members)))
            groups.update(dict.fromkeys(joined.members, joined))
    return groups


def _ratios(node: fx.Node) -> Iterator[ScaleRatio]:
    layer, inputs, output = layer_of(node), _input_scales(node), _output(node)
    if isinstance(layer, Multiply) or (isinstance(layer, QuantizedPReLU) and inputs != (output,)):
        yield ScaleRatio(inputs, output, 1, _PRODUCT_ROUNDINGS)
    elif isinstance(layer, QuantizedGlobalAveragePool):
        yield ScaleRatio(inputs, output, layer.num_values, _GLOBAL_AVERAGE_ROUNDINGS)
    elif isinstance(layer, nn.AvgPool2d):
        terms = math.prod(pair_of(layer.kernel_size))
        yield ScaleRatio(inputs, output, _common_count(layer), _AVERAGE_ROUNDINGS, terms)


def _common_count(layer: nn.AvgPool2d) -> int:
    """Return the least common multiple of the numbers of averaged values, which is lower at the edges."""
    kernel, padding = pair_of(layer.kernel_size), pair_of(layer.padding)
    if layer.count_include_pad and not layer.ceil_mode:
        return math.prod(kernel)
    smallest = (1, 1) if layer.ceil_mode else (kernel[0] - padding[0], kernel[1] - padding[1])
    return math.prod(math.lcm(*range(low, high + 1)) for low, high in zip(smallest, kernel, strict=True))


def _function(node: fx.Node) -> FunctionValues:
    (source,) = _input_scales(node)
    return FunctionValues(cast(nn.Module, layer_of(node)), source)


def _input_scales(node: fx.Node) -> tuple[Scaled, ...]:
    return tuple(_scaled(cast(Quantizer, each)) for each in _inputs(node))


def _output(node: fx.Node) -> LSQFakeQuantize:
    return cast(LSQFakeQuantize, _scaled(cast(Quantizer, _quantizer_after(node))))


def _scaled(quantizer: Quantizer) -> Scaled:
    return quantizer.owner if isinstance(quantizer, SharedScaleFakeQuantize) else quantizer
