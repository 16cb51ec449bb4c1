"""Cross-layer equalization (CLE): rescale channels so that one quantization scale fits all.

An activation tensor has one scale and zero point, which its widest channel decides. A positive factor per channel
passes through sums and homogeneous activation functions, so it can be moved into the weights before and after them
without changing the network's output (Nagel et al., Data-Free Quantization, ICCV 2019).

A tensor with one zero point per channel can also be shifted: its channels are equalized around the middle of their
ranges.

Here the factors minimize the rounding and clipping error of the shared scale: over all zero points, the one with the
smallest total error, with the best factor for each channel. A depthwise convolution or BatchNorm that consumes the
tensor has a scale per channel, so any factor is free. Other consumers hold the weights of all input channels on one
scale per output channel; there the factor is a compromise between activations and weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from qface.graph.channel_factors import Scalable, scale_inputs, scale_outputs
from qface.graph.layers import Add, ChannelAffine
from qface.graph.queries import layer_of, makes_rows
from qface.progress import track
from qface.quantization.fake_quantize import LSQFakeQuantize
from qface.quantization.qparams import IntegerRange
from qface.quantization.quantized_layers import WeightedLayer, is_quantizer

__all__ = ["Region", "cross_layer_equalization", "find_regions"]

_VALUES = 2048  # sampled values per channel of a tensor
_TAIL = 1e-3
"""Fraction of a channel's values outside its range on either side; candidate factors are relative to this range."""
_MIN_RANGE = 1e-3  # minimum range relative to the widest channel's; bounds the factors by its inverse
_RELATIVE_FACTORS = torch.logspace(-0.26, 0.42, 17)
"""Candidate factors 0.55 to 2.6, relative to the factor that maps a channel's range to all integers."""
_ZERO_POINTS = torch.linspace(0, 0.6, 13)
"""Candidate zero points of a tensor, as a fraction of the integer range."""
_SHARES_OF_RANGE = torch.linspace(0.4, 1, 9).tolist()
"""Candidate ends of a channel's range, relative to the range without the tails."""
_SHARE_OF_ACTIVATIONS = 0.8
"""Weight of the activations where consumers share a scale; see :func:`_share_of_activations`."""

_PASSES_FACTORS = (nn.PReLU, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, Add)


@dataclass
class Region:
    """A set of tensors whose channels must all be multiplied by the same factors.

    Args:
        sources: layers that produce the tensors.
        sinks: layers that consume the tensors.
        quantizers: quantizers of the tensors that have a range of their own.
        closed: True if no other layer produces or consumes the tensors.
    """

    sources: list[Scalable] = field(default_factory=list)
    sinks: list[Scalable] = field(default_factory=list)
    quantizers: list[LSQFakeQuantize] = field(default_factory=list)
    closed: bool = True


def find_regions(student: fx.GraphModule) -> list[Region]:
    """Return all regions whose channels can be rescaled.

    Args:
        student: the result of :func:`qface.quantize`.
    """
    regions = _Regions()
    rows: set[fx.Node] = set()  # nodes whose output is [N, C]
    for node in student.graph.nodes:
        layer = layer_of(node)
        inputs = node.all_input_nodes
        passes = is_quantizer(node) or isinstance(layer, _PASSES_FACTORS)
        if makes_rows(node) or ((passes or isinstance(layer, Scalable)) and rows.issuperset(inputs)):
            rows.add(node)
        if passes:
            for source in inputs:
                regions.join(node, source)
            if isinstance(layer, LSQFakeQuantize):
                regions.of(node).quantizers.append(layer)
        elif _takes_factors(layer) and (node in rows or not isinstance(layer, nn.Linear)):
            regions.of(inputs[0]).sinks.append(layer)
            regions.of(node).sources.append(layer)
        else:
            for tensor in (node, *inputs):
                regions.of(tensor).closed = False
    return [region for region in regions.all() if region.closed and region.sinks and _channels(region) == 1]


def _takes_factors(layer: nn.Module | None) -> TypeGuard[Scalable]:
    """Return True for quantized layers; layers that stay in float keep their weights."""
    return isinstance(layer, WeightedLayer) or (isinstance(layer, ChannelAffine) and layer.dim == 1)


def _channels(region: Region) -> int:
    """Return the number of distinct channel counts; with two of them, a sum broadcasts."""
    return len({source.weight.shape[0] for source in region.sources})


class _Regions:
    """Regions by node; joined nodes share one region."""

    def __init__(self) -> None:
        self._regions: dict[fx.Node, Region] = {}

    def of(self, node: fx.Node) -> Region:
        return self._regions.setdefault(node, Region())

    def all(self) -> list[Region]:
        return list({id(region): region for region in self._regions.values()}.values())

    def join(self, one: fx.Node, other: fx.Node) -> None:
        kept, merged = self.of(one), self.of(other)
        if kept is merged:
            return
        kept.sources += merged.sources
        kept.sinks += merged.sinks
        kept.quantizers += merged.quantizers
        kept.closed &= merged.closed
        self._regions = {node: kept if region is merged else region for node, region in self._regions.items()}


def cross_layer_equalization(student: fx.GraphModule, batches: Sequence[Tensor]) -> None:
    """Equalize the channels of every tensor of ``student`` in place; fake quantization must be off.

    Args:
        student: the result of :func:`qface.quantize`.
        batches: normalized images, each float32 [N, 3, H, W].
    """
    regions = find_regions(student)
    values = _channel_values(student, [quantizer for region in regions for quantizer in region.quantizers], batches)
    for region in track(regions, "equalize"):
        seen = {quantizer: values[quantizer] for quantizer in region.quantizers if quantizer in values}
        found = [seen.pop(quantizer) for quantizer in _lowest_bit_quantizers(region) if quantizer in seen]
        if len(region.quantizers) == 1 and found and region.quantizers[0].center is not None:
            _equalize_around_centers(region, region.quantizers[0].center, found[0])
        elif found:
            _multiply(region, _bounded(region, _factors(region, found), found, seen))


def _equalize_around_centers(region: Region, center: Tensor, values: Tensor) -> None:
    """Equalize the channels of a tensor with a zero point per channel, and set ``center``, [C], which moves these."""
    low, high = _best_ranges(values, _lowest_bit_quantizers(region)[0].integer_range)
    middle = (low + high) / 2
    factor = _factors(region, [values - middle[:, None]])
    _multiply(region, factor)
    center.copy_(middle * factor)


def _best_ranges(values: Tensor, integer_range: IntegerRange) -> tuple[Tensor, Tensor]:
    """Return the range of each channel with the smallest quantization error, zero included.

    Args:
        values: sampled values, [C, values].
        integer_range: integers of the tensor.

    Returns:
        Lower and upper ends, [C] each.
    """
    low, high = _ends(values)
    tried = [(low * below, high * above) for below, above in itertools.product(_SHARES_OF_RANGE, repeat=2)]
    best = torch.stack([integer_range.squared_errors(values, *ends) for ends in tried]).argmin(0, keepdim=True)
    lows, highs = (torch.stack(ends).gather(0, best)[0] for ends in zip(*tried, strict=True))
    return lows, highs


def _lowest_bit_quantizers(region: Region) -> list[LSQFakeQuantize]:
    """Return the quantizers with the fewest bits; the others hardly lose anything, within bounds."""
    bits = min((quantizer.bits for quantizer in region.quantizers), default=0)
    return [quantizer for quantizer in region.quantizers if quantizer.bits == bits]


def _channel_values(
    student: fx.GraphModule, quantizers: list[LSQFakeQuantize], batches: Sequence[Tensor]
) -> dict[LSQFakeQuantize, Tensor]:
    """Sample the inputs of ``quantizers``, [C, values]; tensors of zeros only are left out."""
    parts: dict[LSQFakeQuantize, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def look(quantizer: nn.Module, inputs: tuple[Any, ...]) -> None:
        channels = inputs[0].detach().transpose(0, 1).flatten(1)
        chosen = torch.randperm(channels.shape[1], generator=generator)[: -(-_VALUES // len(batches))]
        parts.setdefault(cast(LSQFakeQuantize, quantizer), []).append(channels[:, chosen.to(channels.device)])

    hooks = [quantizer.register_forward_pre_hook(look) for quantizer in quantizers]
    try:
        for batch in batches:
            student(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {quantizer: torch.cat(seen, 1) for quantizer, seen in parts.items()}
    return {quantizer: values for quantizer, values in found.items() if values.any()}


def _factors(region: Region, tensors: list[Tensor]) -> Tensor:
    """Return the factor of each channel, [C], with geometric mean 1."""
    values = torch.cat([each / _ranges(each).mean() for each in tensors], 1)
    factor = _best_factors(values, _lowest_bit_quantizers(region)[0].integer_range.num_steps, _importance(region))
    shared = [_weight_ranges(sink) for sink in region.sinks if not _has_scale_per_input_channel(sink)]
    weights = torch.stack(shared).amax(0) if shared else torch.zeros(())
    if weights.any():  # for consumers with zero weights, any factor is free
        weights = weights.clamp(min=_MIN_RANGE * float(weights.max()))
        share = _share_of_activations(region)
        factor = factor**share * weights ** (1 - share)
    return factor / factor.log().mean().exp()


def _bounded(region: Region, factor: Tensor, narrow: list[Tensor], wider: dict[LSQFakeQuantize, Tensor]) -> Tensor:
    """Limit the factors so that quantizers with more bits keep at most half the lowest-bit step.

    Values that a later ReLU clips count here. A channel that is never active after the ReLU could get any factor, and
    would then dominate the scale of a quantizer before the ReLU.
    """
    num_steps = _lowest_bit_quantizers(region)[0].integer_range.num_steps
    narrow_step = max(float((factor * _ranges(values)).max()) for values in narrow) / num_steps
    for quantizer, values in wider.items():
        longest = quantizer.integer_range.num_steps * narrow_step / 2
        factor = torch.minimum(factor, longest / _ranges(values))
    return factor


def _share_of_activations(region: Region) -> float:
    """Return the exponent of the activations in the factor, 0..1, where consumers share a scale.

    A squared error is proportional to 4^-bits, and the side with the larger error gets the larger exponent. Measured
    1 - cosine over 516 faces of a calibrated MobileFaceNet without training: w6a6 0.0206 (exponent 0.5), 0.0201 (0.8),
    0.0210 (0.9); w4a8 0.0566 (0.2), 0.0596 (0.5), 0.0639 (0.8).
    """
    sinks = [sink for sink in region.sinks if not _has_scale_per_input_channel(sink)]
    weight_bits = min(sink.weight_bits for sink in sinks if isinstance(sink, WeightedLayer))
    weights = (1 - _SHARE_OF_ACTIVATIONS) * 4.0 ** (_lowest_bit_quantizers(region)[0].bits - weight_bits)
    return _SHARE_OF_ACTIVATIONS / (_SHARE_OF_ACTIVATIONS + weights)


def _best_factors(values: Tensor, num_steps: int, importance: Tensor) -> Tensor:
    """Return the factor of each channel, [C], with the smallest quantization error at scale 1.

    Args:
        values: sampled values, [C, values].
        num_steps: number of integer steps.
        importance: weight of a squared error in each channel, [C].
    """
    ranges = _ranges(values)
    middle = num_steps / ranges.clamp(min=_MIN_RANGE * float(ranges.max()))
    tried = [factor * middle for factor in _RELATIVE_FACTORS.tolist()]
    lows = [-round(share * num_steps) for share in _ZERO_POINTS.tolist()]
    errors = torch.stack([_errors(values, factor, lows, num_steps) for factor in tried])
    smallest = errors.min(0)  # over the factors, [zero points, C]
    zero_point = int((smallest.values @ importance).argmin())
    best = torch.stack(tried).gather(0, smallest.indices[zero_point, None])[0]
    inactive = ranges == 0  # on these images; on others the channel may be as wide as the widest
    return torch.where(inactive, best[~inactive].min(), best)


def _errors(values: Tensor, factor: Tensor, lows: list[int], num_steps: int) -> Tensor:
    """Return the mean squared error per channel for each minimum integer in ``lows``, [lows, C]."""
    scaled = values * factor[:, None]
    rounded = scaled.round()
    errors = [(rounded.clamp(low, low + num_steps) - scaled).square_().mean(1) for low in lows]
    return torch.stack(errors) / factor.square()


def _importance(region: Region) -> Tensor:
    """Return the gain of each channel's squared error: the consumers' squared weights, [C]."""
    return torch.stack([_squared_weights(sink) for sink in region.sinks]).sum(0)


def _squared_weights(layer: Scalable) -> Tensor:
    squares = layer.weight.detach().square()
    if isinstance(layer, nn.Conv2d):
        return squares.reshape(layer.groups, -1, *squares.shape[1:]).sum((1, 3, 4)).flatten()
    return squares.sum(0) if isinstance(layer, nn.Linear) else squares


def _ranges(values: Tensor) -> Tensor:
    """Return the range of each channel of ``values`` [C, values], without the tails, zero included; [C]."""
    low, high = _ends(values)
    return (high - low).abs()  # of zeros with signs it may be -0


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of each channel's range without the tails, zero included; [C] each."""
    tail = max(1, int(_TAIL * values.shape[1]))
    high, low = values.topk(tail).values[:, -1], values.topk(tail, largest=False).values[:, -1]
    return low.clamp(max=0), high.clamp(min=0)


def _has_scale_per_input_channel(layer: Scalable) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == layer.in_channels
    return isinstance(layer, ChannelAffine)


def _weight_ranges(layer: Scalable) -> Tensor:
    """Return the RMS of each input channel's weights relative to the maximum of their output channel, [C]."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        # [groups, outputs, inputs]
        weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).flatten(3).abs().amax(3)
    else:
        weight = weight.abs().unsqueeze(0)
    maximum = weight.amax(2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / maximum).square().mean(1).sqrt().flatten()


def _multiply(region: Region, factor: Tensor) -> None:
    for source in region.sources:
        scale_outputs(source, factor)
    for sink in region.sinks:
        scale_inputs(sink, 1 / factor)
