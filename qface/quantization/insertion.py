"""Insertion of quantizers: one after each value that something reads as integers."""

from __future__ import annotations

from torch import fx, nn

from qface.graph.edit import add_layer, bypass
from qface.graph.layers import Add
from qface.graph.queries import input_of, is_clamp, is_shape_only, layer_of
from qface.preprocessing import Preprocessing
from qface.quantization.fake_quantize import ImageFakeQuantize, LSQFakeQuantize, SharedScaleFakeQuantize
from qface.quantization.placement import OTHER_BITS, activation_bits, computes_in_float
from qface.quantization.quantization_config import QuantizationConfig
from qface.quantization.quantized_layers import (
    QuantizedAffine,
    QuantizedPReLU,
    WeightedLayer,
    is_quantizer,
)

__all__ = ["place_quantizers"]

_NAME = "activation_post_process"  # torch.ao's


def place_quantizers(student: fx.GraphModule, config: QuantizationConfig, preprocessing: Preprocessing) -> None:
    """Leave a quantizer of the bits of the placement table after each value that has one, and no other.

    torch.ao observes every layer that it knows; what is missing is after a float layer, and what is too much carries no
    information: after layers that only move values, before a clamp, and where nothing reads integers.
    """
    placed = _taken_out(student)
    image_quantizer = _image_quantizer(preprocessing)
    for node in list(student.graph.nodes):
        bits = None if node.op == "output" or is_shape_only(node) else _bits(node, config)
        if bits is None or _feeds_only_a_clamp(node):
            continue
        if node.op == "placeholder" and image_quantizer is not None:
            quantizer: nn.Module = image_quantizer
        elif _shares_the_scale_of_a_prelu(node, config):
            quantizer = SharedScaleFakeQuantize()
        else:
            quantizer = LSQFakeQuantize(bits, observer=config.activation_observer, percentile=config.percentile)
        _insert(student, node, quantizer, placed.get(node))


def _taken_out(student: fx.GraphModule) -> dict[fx.Node, str]:
    """Erase all quantizers of activations; their names, by what they rounded."""
    placed: dict[fx.Node, str] = {}
    for node in list(student.graph.nodes):
        if is_quantizer(node):
            placed.setdefault(input_of(node), str(node.target))
            bypass(node, input_of(node))
            student.delete_submodule(str(node.target))
    return placed


def _bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    if node.op not in ("placeholder", "call_module") and not computes_in_float(node):
        return None
    return activation_bits(node, config) if node.users else None


def _insert(student: fx.GraphModule, node: fx.Node, quantizer: nn.Module, name: str | None) -> None:
    """Round what ``node`` makes; the float readers of a float value read it as it is."""
    readers = [user for user in node.users if not (_is_float(node) and _leads_to_float_only(user))]
    path = name or add_layer(student, f"{_NAME}_{node.name}", quantizer)
    student.add_submodule(path, quantizer.train(student.training))
    with student.graph.inserting_after(node):
        rounded = student.graph.call_module(path, (node,))
    rounded.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, rounded)


def _is_float(node: fx.Node) -> bool:
    return computes_in_float(node) or node.op == "placeholder"


def _leads_to_float_only(node: fx.Node) -> bool:
    if is_shape_only(node):
        return all(_leads_to_float_only(user) for user in node.users)
    return computes_in_float(node) or node.op == "output"


def _feeds_only_a_clamp(node: fx.Node) -> bool:
    """ReLU and ReLU6 are part of the rounding that follows them, so nothing is rounded in between."""
    if not isinstance(layer_of(node), (*WeightedLayer, Add, QuantizedAffine)):
        return False
    return len(node.users) == 1 and all(is_clamp(user) for user in node.users)


def _shares_the_scale_of_a_prelu(node: fx.Node, config: QuantizationConfig) -> bool:
    """True if the sole consumer is a PReLU with fewer than 8 output bits; both then share one uint8 scale."""
    (reader, *others) = node.users
    if others or not isinstance(layer_of(reader), QuantizedPReLU) or computes_in_float(node):
        return False
    bits = activation_bits(reader, config)
    return bits is not None and bits < OTHER_BITS


def _image_quantizer(preprocessing: Preprocessing) -> ImageFakeQuantize | None:
    """Rounds every byte to itself; None where the channels have no scale in common."""
    if len(set(preprocessing.mean)) > 1 or len(set(preprocessing.std)) > 1:
        return None
    mean, std = preprocessing.mean[0], preprocessing.std[0]
    zero_point = round(mean)
    if not 0 <= zero_point <= 255:
        return None
    return ImageFakeQuantize(scale=1 / std, zero_point=zero_point, offset=(zero_point - mean) / std)
