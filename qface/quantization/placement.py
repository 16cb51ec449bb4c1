"""What w6a6 means: which tensor has how many bits. Quantization reads it, what follows the quantizers that it placed.

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
``EMBEDDING``        float                  what the network returns
===================  =====================  ==================================================================

The scale of a BatchNorm that cannot be folded loses nothing, as a weight of 8 bits with a float scale for each channel.
"""

from __future__ import annotations

import enum

from torch import fx

from qface.models.layers import L2Normalize
from qface.quantization.quantization_config import QuantizationConfig
from qface.quantization.quantized_layers import WeightedLayer, is_quantizer, is_shape_only, layer_of

__all__ = ["BIAS_BITS", "IMAGE_BITS", "OTHER_BITS", "Role", "activation_bits", "role_of"]

IMAGE_BITS = 8
OTHER_BITS = 8
BIAS_BITS = 32


class Role(enum.Enum):
    """Part that an activation plays in the network."""

    IMAGE = "image"
    MATMUL_INPUT = "matmul_input"
    OTHER = "other"
    EMBEDDING = "embedding"


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
        return Role.EMBEDDING
    return Role.OTHER


def activation_bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    """Bits of the value that ``node`` produces; None for float."""
    role = role_of(node)
    if role is Role.MATMUL_INPUT:
        readers = [reader for reader in _readers(node) if isinstance(layer_of(reader), WeightedLayer)]
        return min(config.activation_bits_of(str(reader.target)) for reader in readers)
    return {Role.IMAGE: IMAGE_BITS, Role.OTHER: OTHER_BITS, Role.EMBEDDING: None}[role]
