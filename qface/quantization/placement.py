"""The bits of each tensor, or what w6a6 means. Quantization reads them; later stages read the quantizers it placed.

===================  =====================  ==================================================================
role                 bits                   tensor
===================  =====================  ==================================================================
``IMAGE``            8                      the image, as the bytes it came in
``MATMUL_INPUT``     ``activation_bits``    whatever a convolution or linear layer reads, save the image
``OTHER``            8                      every other value: before an activation function, a gate, a residual
                                            sum (:mod:`qface.quantization.residuals`); before a PReLU with fewer
                                            bits behind it, with the scale of what is behind it
``WEIGHT``           ``weight_bits``        weights of all convolutions and linear layers, first and last too
``SLOPE``            8                      slopes of PReLU
``BIAS``             32                     biases, in units of input scale x weight scale
``FLOAT``            float                  what the network returns, and what only float layers read, save after a
                                            convolution
===================  =====================  ==================================================================

The scale of a BatchNorm that cannot be folded loses nothing, as a weight of 8 bits with a float scale for each channel.
"""

from __future__ import annotations

import enum

from torch import fx, nn

from qface.graph.layers import Add, Concat, L2Normalize, Maximum, Multiply
from qface.graph.queries import CLAMPS, is_shape_only, layer_of
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
    """Part that an activation plays in the network."""

    IMAGE = "image"
    MATMUL_INPUT = "matmul_input"
    OTHER = "other"
    FLOAT = "float"


INTEGER_LAYERS = (
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
    QuantizedAffine,
    QuantizedGlobalAveragePool,
    *CLAMPS,
    nn.Sigmoid,
    nn.AvgPool2d,
    Add,
    Multiply,
    Concat,
    Maximum,
)
"""Layers that read and make quantized values; all others compute in float."""


def computes_in_float(node: fx.Node) -> bool:
    """True if ``node`` is part of a float island: it has no integer form, and makes values of its own."""
    if node.op in ("placeholder", "output", "get_attr") or is_quantizer(node) or is_shape_only(node):
        return False
    layer = layer_of(node)
    if isinstance(layer, QuantizedAffine):
        return layer.dim != 1 or layer.num_channels == 1
    return not isinstance(layer, INTEGER_LAYERS)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read the values of ``node``, looking through quantizers' and shape-only nodes."""
    found = []
    for user in node.users:
        if is_shape_only(user) or is_quantizer(user):
            found.extend(_readers(user))
        else:
            found.append(user)
    return found


def role_of(node: fx.Node) -> Role:
    """The role of the value that ``node`` produces."""
    if node.op == "placeholder":
        return Role.IMAGE
    readers = _readers(node)
    if any(isinstance(layer_of(reader), WeightedLayer) for reader in readers):
        return Role.MATMUL_INPUT
    if any(reader.op == "output" or isinstance(layer_of(reader), L2Normalize) for reader in readers):
        return Role.FLOAT
    if all(computes_in_float(reader) for reader in readers) and not isinstance(layer_of(node), QuantizedConv2d):
        return Role.FLOAT
    return Role.OTHER


def activation_bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    """Bits of the value that ``node`` produces; None for float."""
    role = role_of(node)
    if role is Role.MATMUL_INPUT:
        readers = [reader for reader in _readers(node) if isinstance(layer_of(reader), WeightedLayer)]
        return min(config.activation_bits_of(str(reader.target)) for reader in readers)
    return {Role.IMAGE: IMAGE_BITS, Role.OTHER: OTHER_BITS, Role.FLOAT: None}[role]
