"""Size entries predicted for the packed file of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from qface.deployment.size.report import SizeEntry
from qface.graph import ChannelAffine
from qface.graph.queries import is_quantized, layer_of
from qface.quantization import (
    ImageFakeQuantize,
    LSQFakeQuantize,
    QuantizationConfig,
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
    WeightFakeQuantize,
    quantize,
)
from qface.quantization.placement import BIAS_BITS
from qface.quantization.quantized_layers import AFFINE_BITS, SLOPE_BITS
from qface.quantization.weight_qparams import takes_offsets

__all__ = ["entries_of_network"]


def entries_of_network(model: nn.Module, bits: int | QuantizationConfig) -> Iterator[SizeEntry]:
    """Yield the tensors of the packed file of a student.

    Args:
        model: a student, or a float network, which is quantized with ``bits``.
        bits: bits of a float network's student, or a config.

    Raises:
        ConfigError: bits are out of range.
        TraceError: torch.export cannot trace the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; the message names it.
    """
    student = model if is_quantized(model) else quantize(model, bits)
    assert isinstance(student, fx.GraphModule)
    parameters = dict(student.named_parameters()) | dict(student.named_buffers())
    for node in student.graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            yield from _layer_entries(str(node.target), layer)
        elif node.op == "get_attr":
            yield _words(str(node.target), "constant", parameters[str(node.target)].numel())


def _layer_entries(name: str, layer: nn.Module) -> Iterator[SizeEntry]:
    if isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
        yield from _matmul_entries(name, layer)
    elif isinstance(layer, QuantizedPReLU):
        slopes = layer.weight.numel()
        if _differ(layer.quant_context.output):
            yield SizeEntry(f"{name}.slope_bias", "zero_point", 2 * slopes, slopes, 16)
        yield SizeEntry(f"{name}.slope", "slope", slopes, slopes, SLOPE_BITS)
        yield _words(f"{name}.slope_scale", "scale", 1)
    elif isinstance(layer, QuantizedAffine) and layer.quant_context.complete:
        channels = layer.num_channels
        yield SizeEntry(f"{name}.affine", "affine", channels, channels, AFFINE_BITS)
        yield _words(f"{name}.affine_scale", "scale", channels)
        yield _words(f"{name}.bias", "bias", channels, BIAS_BITS)
    elif isinstance(layer, ChannelAffine):
        yield _words(f"{name}.scale", "affine", layer.weight.numel())
        yield _words(f"{name}.shift", "affine", layer.bias.numel())
    elif isinstance(layer, (ImageFakeQuantize, LSQFakeQuantize)):
        yield _words(f"{name}.scale", "scale", 1)
        yield SizeEntry(f"{name}.zero_point", "zero_point", 1, 1, 8)
    else:  # a float layer
        multiplies = isinstance(layer, (nn.Conv2d, nn.Linear))
        for kind, parameter in layer.named_parameters():
            role = kind if multiplies else "affine"
            yield _words(f"{name}.{kind}", role, parameter.numel())


def _matmul_entries(name: str, layer: QuantizedConv2d | QuantizedLinear) -> Iterator[SizeEntry]:
    weight, channels = layer.weight, len(layer.weight)
    packed = SizeEntry(f"{name}.weight", "weight", 0, weight.numel(), layer.weight_fake_quant.bits)
    yield replace(packed, bytes=packed.packed_bytes)
    if _has_offsets(layer.weight_fake_quant):
        yield SizeEntry(f"{name}.weight_offset", "zero_point", channels, channels, 8)
    if layer.bias is not None:
        yield _words(f"{name}.bias", "bias", layer.bias.numel(), BIAS_BITS)
    yield _words(f"{name}.weight_scale", "scale", channels)
    if isinstance(layer, QuantizedConv2d) and any(layer.padding) and _differ(layer.quant_context.inputs[0]):
        padded = layer.in_channels  # the values of its padding
        yield SizeEntry(f"{name}.zero_points", "zero_point", padded, padded, 8)


def _has_offsets(quantizer: WeightFakeQuantize) -> bool:
    """Return True if channels of a weight have offsets, or will have some once it is calibrated."""
    return bool(quantizer.offset.any()) if quantizer.calibrated else takes_offsets(quantizer)


def _differ(quantizer: nn.Module | None) -> bool:
    """Return True if calibration gives the channels of a tensor different zero points."""
    return isinstance(quantizer, LSQFakeQuantize) and quantizer.center is not None


def _words(name: str, kind: str, elements: int, bits: int = 32) -> SizeEntry:
    """Return an entry with four bytes per element, whatever its bits."""
    return SizeEntry(name, kind, 4 * elements, elements, bits)
