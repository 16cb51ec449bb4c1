"""Insertion of a quantizer after each value that has integer consumers."""

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
    QuantizedConv2d,
    QuantizedPReLU,
    WeightedLayer,
    is_quantizer,
)

__all__ = ["place_quantizers"]

_NAME = "activation_post_process"  # torch.ao's name for observers and fake-quant modules


def place_quantizers(student: fx.GraphModule, config: QuantizationConfig, preprocessing: Preprocessing) -> None:
    """Replace torch.ao's quantizers by those of the placement table.

    The table is :mod:`qface.quantization.placement`. torch.ao places a quantizer after every layer that it knows: none
    after float layers, and useless ones after layers that only move values, before a fused clamp, and where no
    consumer computes in integers.

    Args:
        student: the result of ``prepare_qat_fx``; changed in place.
        config: bits and observers.
        preprocessing: of the student's images.
    """
    old_names = _remove_quantizers(student)
    image_quantizer = _image_quantizer(preprocessing)
    for node in list(student.graph.nodes):
        bits = None if node.op == "output" or is_shape_only(node) else _bits(node, config)
        if bits is None or _feeds_only_clamps(node):
            continue
        if node.op == "placeholder" and image_quantizer is not None:
            quantizer: nn.Module = image_quantizer
        elif _shares_scale_of_prelu(node, config):
            quantizer = SharedScaleFakeQuantize()
        else:
            quantizer = LSQFakeQuantize(
                bits,
                observer=config.activation_observer,
                percentile=config.percentile,
                num_zero_points=_num_zero_points(node),
            )
        _insert(student, node, quantizer, old_names.get(node))


def _remove_quantizers(student: fx.GraphModule) -> dict[fx.Node, str]:
    """Remove all activation quantizers; return their names by the node that they quantized."""
    old_names: dict[fx.Node, str] = {}
    for node in list(student.graph.nodes):
        if is_quantizer(node):
            old_names.setdefault(input_of(node), str(node.target))
            bypass(node, input_of(node))
            student.delete_submodule(str(node.target))
    return old_names


def _bits(node: fx.Node, config: QuantizationConfig) -> int | None:
    if node.op not in ("placeholder", "call_module") and not computes_in_float(node):
        return None
    return activation_bits(node, config) if node.users else None


def _insert(student: fx.GraphModule, node: fx.Node, quantizer: nn.Module, name: str | None) -> None:
    """Insert a quantizer after ``node``; float consumers of a float node keep the unquantized value."""
    consumers = [user for user in node.users if not (_is_float(node) and _is_float_consumer(user))]
    path = name or add_layer(student, f"{_NAME}_{node.name}", quantizer)
    student.add_submodule(path, quantizer.train(student.training))
    with student.graph.inserting_after(node):
        quantized = student.graph.call_module(path, (node,))
    quantized.meta = dict(node.meta)
    for consumer in consumers:
        consumer.replace_input_with(node, quantized)


def _is_float(node: fx.Node) -> bool:
    return computes_in_float(node) or node.op == "placeholder"


def _is_float_consumer(node: fx.Node) -> bool:
    if is_shape_only(node):
        return all(_is_float_consumer(user) for user in node.users)
    return computes_in_float(node) or node.op == "output"


def _feeds_only_clamps(node: fx.Node) -> bool:
    """Return True if all consumers are ReLU or ReLU6, which are fused into the quantizer after them."""
    if not isinstance(layer_of(node), (*WeightedLayer, Add, QuantizedAffine)):
        return False
    return len(node.users) == 1 and all(is_clamp(user) for user in node.users)


def _shares_scale_of_prelu(node: fx.Node, config: QuantizationConfig) -> bool:
    """True if the sole consumer is a PReLU with fewer than 8 output bits; both share one scale."""
    (consumer, *others) = node.users
    if others or not isinstance(layer_of(consumer), QuantizedPReLU) or computes_in_float(node):
        return False
    bits = activation_bits(consumer, config)
    return bits is not None and bits < OTHER_BITS


def _num_zero_points(node: fx.Node) -> int:
    """Return the number of channels if each may have a zero point of its own, else 1.

    Biases absorb the differences: those of the layer before, of a PReLU's integer form if its input shares the scale,
    and of the convolutions after it.
    """
    producer = node
    if isinstance(layer_of(node), QuantizedPReLU) and isinstance(layer_of(input_of(node)), SharedScaleFakeQuantize):
        producer = input_of(input_of(node))
    readers = [layer_of(user) for user in node.users]
    convolutions = [reader for reader in readers if isinstance(reader, QuantizedConv2d)]
    made = isinstance(layer_of(producer), (QuantizedConv2d, QuantizedAffine))
    return convolutions[0].in_channels if made and len(convolutions) == len(readers) else 1


def _image_quantizer(preprocessing: Preprocessing) -> ImageFakeQuantize | None:
    """Return a quantizer lossless for pixels, or None if mean or std differ between channels."""
    if len(set(preprocessing.mean)) > 1 or len(set(preprocessing.std)) > 1:
        return None
    mean, std = preprocessing.mean[0], preprocessing.std[0]
    zero_point = round(mean)
    if not 0 <= zero_point <= 255:
        return None
    return ImageFakeQuantize(scale=1 / std, zero_point=zero_point, offset=(zero_point - mean) / std)
