"""What w6a6 means: which tensor has which width. Quantization reads it, what follows the quantizers that it placed.

===================  =====================  ==================================================================
role                 width                  tensor
===================  =====================  ==================================================================
``IMAGE``            8                      the image, as the bytes it came in
``MULTIPLIED``       ``activation_bits``    whatever a convolution or linear layer reads, save the image
``OTHER``            8                      every other value: before an activation function, a gate, a residual
                                            sum (:mod:`qface.quantization.residuals`); before a PReLU with fewer
                                            bits behind it, on the step of what is behind it
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

from qface.models.layers import L2Normalise
from qface.quantization.config import QuantizationConfig
from qface.quantization.layers import WeightedLayer, is_quantizer, is_shape_only, layer_of

__all__ = ["BIAS_BITS", "IMAGE_BITS", "OTHER_BITS", "Role", "activation_bits", "role_of"]

IMAGE_BITS = 8
OTHER_BITS = 8
BIAS_BITS = 32


class Role(enum.Enum):
    """Part that an activation plays in the network."""

    IMAGE = "image"
    MULTIPLIED = "multiplied"
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
        return Role.MULTIPLIED
    if any(reader.op == "output" or isinstance(layer_of(reader), L2Normalise) for reader in readers):
        return Role.EMBEDDING
    return Role.OTHER


def activation_bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    """Width of the value that ``node`` produces; None for float."""
    role = role_of(node)
    if role is Role.MULTIPLIED:
        readers = [reader for reader in _readers(node) if isinstance(layer_of(reader), WeightedLayer)]
        return min(config.activation_bits_of(str(reader.target)) for reader in readers)
    return {Role.IMAGE: IMAGE_BITS, Role.OTHER: OTHER_BITS, Role.EMBEDDING: None}[role]
