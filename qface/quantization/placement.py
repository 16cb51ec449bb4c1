"""Placement table: the bits of each tensor.

Quantization follows the table; later stages look at the quantizers it placed.

===================  =====================  ==================================================================
role                 bits                   tensor
===================  =====================  ==================================================================
``IMAGE``            8                      image, as uint8 pixels
``MATMUL_INPUT``     ``activation_bits``    input of a convolution or linear layer, except the image
``OTHER``            8                      every other activation: input of an activation function, gate or
                                            residual sum (:mod:`qface.quantization.residuals`). The input of a
                                            PReLU with fewer output bits uses the output's scale
``WEIGHT``           ``weight_bits``        weights of all convolutions and linear layers, first and last included
``SLOPE``            8                      PReLU slopes
``BIAS``             32                     biases, in units of input scale x weight scale
``FLOAT``            float                  output of the network, and values with only float consumers, except the
                                            output of a convolution. Layers without weights compute in float where
                                            all their inputs are float
===================  =====================  ==================================================================

A BatchNorm that cannot be folded has 8-bit weights with one scale per channel, which is lossless.
"""

from __future__ import annotations

import enum

from torch import fx, nn

from qface.graph.layers import Add, Concat, L2Normalize, Maximum, Multiply
from qface.graph.queries import CLAMPS, is_shape_only, layer_of, source_of_values
from qface.quantization.quantization_config import QuantizationConfig
from qface.quantization.quantized_layers import (
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedGlobalAveragePool,
    QuantizedLinear,
    QuantizedPReLU,
    WeightedLayer,
    is_quantizer,
)

__all__ = [
    "BIAS_BITS",
    "IMAGE_BITS",
    "INTEGER_LAYERS",
    "OTHER_BITS",
    "Role",
    "activation_bits",
    "computes_in_float",
    "role_of",
]

IMAGE_BITS = 8
OTHER_BITS = 8
BIAS_BITS = 32


class Role(enum.Enum):
    """Role of an activation in the network, which decides its bits."""

    IMAGE = "image"
    MATMUL_INPUT = "matmul_input"
    OTHER = "other"
    FLOAT = "float"


_WITHOUT_WEIGHTS = (*CLAMPS, nn.Sigmoid, nn.AvgPool2d, Add, Multiply, Concat, Maximum)
INTEGER_LAYERS = (
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
    QuantizedAffine,
    QuantizedGlobalAveragePool,
    *_WITHOUT_WEIGHTS,
)
"""Layers with quantized inputs and outputs; all others compute in float."""


def computes_in_float(node: fx.Node) -> bool:
    """Return True if ``node`` computes new values in float: it has no integer form, or nothing to gain from it."""
    if node.op in ("placeholder", "output", "get_attr") or is_quantizer(node) or is_shape_only(node):
        return False
    return _has_no_integer_form(node) or _is_between_float_values(node)


def _has_no_integer_form(node: fx.Node) -> bool:
    layer = layer_of(node)
    if isinstance(layer, QuantizedAffine):
        return layer.dim != 1 or layer.num_channels == 1
    return not isinstance(layer, INTEGER_LAYERS)


def _is_between_float_values(node: fx.Node) -> bool:
    """Return True for a layer without weights all of whose inputs are float.

    To quantize the inputs costs more than the integer kernel saves: a PoolFormer took 1.3 times as long as in float32.
    """
    left, seen = [node], set[fx.Node]()
    while left:
        each = left.pop()
        if not isinstance(layer_of(each), _WITHOUT_WEIGHTS):
            return False
        sources = {source_of_values(source) for source in each.all_input_nodes} - seen
        seen |= sources
        if not all(source.op in ("call_module", "call_function") and not is_quantizer(source) for source in sources):
            return False
        left += [source for source in sources if not _has_no_integer_form(source)]
    return True


def _consumers(node: fx.Node) -> list[fx.Node]:
    """Return the consumers of the values of ``node``, looking through quantizers and shape-only nodes."""
    found = []
    for user in node.users:
        if is_shape_only(user) or is_quantizer(user):
            found.extend(_consumers(user))
        else:
            found.append(user)
    return found


def role_of(node: fx.Node) -> Role:
    """Return the role of the output of ``node``.

    Args:
        node: a node of a student or of a canonical float network.
    """
    if node.op == "placeholder":
        return Role.IMAGE
    consumers = _consumers(node)
    if any(isinstance(layer_of(consumer), WeightedLayer) for consumer in consumers):
        return Role.MATMUL_INPUT
    if any(consumer.op == "output" or isinstance(layer_of(consumer), L2Normalize) for consumer in consumers):
        return Role.FLOAT
    if all(computes_in_float(consumer) for consumer in consumers) and not isinstance(layer_of(node), QuantizedConv2d):
        return Role.FLOAT
    return Role.OTHER


def activation_bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    """Return the bits of the output of ``node``.

    Args:
        node: a node of a student or of a canonical float network.
        config: bits of the network and of single layers.

    Returns:
        2 to 8; None for float. With several convolutions or linear layers as consumers, the minimum of their bits.
    """
    role = role_of(node)
    if role is Role.MATMUL_INPUT:
        consumers = [consumer for consumer in _consumers(node) if isinstance(layer_of(consumer), WeightedLayer)]
        return min(config.activation_bits_of(str(consumer.target)) for consumer in consumers)
    return {Role.IMAGE: IMAGE_BITS, Role.OTHER: OTHER_BITS, Role.FLOAT: None}[role]
