"""Cross-layer equalization: the channels of a tensor made to share one scale at little loss.

A tensor has one scale and zero point, and its widest channel decides them. A factor for each channel passes through
sums and through activation functions that are homogeneous, into the weights before and behind them (Nagel et al.,
Data-Free Quantization, ICCV 2019), so that the network computes what it did. Factors are chosen here for what rounding
and clamping with the tensor's scale lose: of all zero points, the one with which all channels lose least, each with the
factor that is best for it. A depthwise convolution or a BatchNorm behind the tensor takes any factor without loss,
since each of its channels has a scale of its own. Any other layer holds the weights of all channels that it reads on
one scale; there activations and weights share what is to be evened out.
"""

from __future__ import annotations

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
from qface.quantization.quantized_layers import WeightedLayer, is_quantizer

__all__ = ["Region", "cross_layer_equalization", "find_regions"]

_VALUES = 2048  # of each channel of a tensor that are looked at
_TAIL = 1e-3
"""Share of a channel's values on either side that may lie beyond its range, around which factors are tried."""
_NARROWEST = 1e-3  # of the widest channel's range: none is made wider than its inverse says
_RELATIVE_FACTORS = torch.logspace(-0.26, 0.42, 17)
"""Tried for each channel, in parts of the factor that makes its range as long as all integers: 0.55 to 2.6."""
_ZERO_POINTS = torch.linspace(0, 0.6, 13)
"""Tried for each tensor, in parts of the integers."""
_SHARE_OF_ACTIVATIONS = 0.8
"""Share of the equalization that activations get where weights share a scale; see :func:`_share_of_activations`."""

_PASSES_FACTORS = (nn.PReLU, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, Add)


@dataclass
class Region:
    """Tensors whose channels can only be multiplied by the same factors.

    Args:
        sources: layers whose outputs they are.
        sinks: layers that read them.
        quantizers: that round them, where they have a range of their own.
        closed: whether nothing else makes or reads them.
    """

    sources: list[Scalable] = field(default_factory=list)
    sinks: list[Scalable] = field(default_factory=list)
    quantizers: list[LSQFakeQuantize] = field(default_factory=list)
    closed: bool = True


def find_regions(student: fx.GraphModule) -> list[Region]:
    """All regions through which factors can pass."""
    regions = _Regions()
    rows: set[fx.Node] = set()  # tensors [N, channels]
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
    """True of quantized layers; one that stays in float keeps its weights."""
    return isinstance(layer, WeightedLayer) or (isinstance(layer, ChannelAffine) and layer.dim == 1)


def _channels(region: Region) -> int:
    """The number of different channel counts of the layers: with two of them, a sum broadcasts one over the other."""
    return len({source.weight.shape[0] for source in region.sources})


class _Regions:
    """A region for each node's tensor; joined ones share it."""

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
    """Make the channels of every tensor of ``student`` share one scale at little loss, in place, with quantizers off.

    Args:
        student: what :func:`qface.quantize` returned.
        batches: of normalized images, each float32 [N, 3, height, width].
    """
    regions = find_regions(student)
    values = _channel_values(student, [quantizer for region in regions for quantizer in region.quantizers], batches)
    for region in track(regions, "equalize"):
        seen = {quantizer: values[quantizer] for quantizer in region.quantizers if quantizer in values}
        found = [seen.pop(quantizer) for quantizer in _narrowest(region) if quantizer in seen]
        if found:
            _multiply(region, _bounded(region, _factors(region, found), found, seen))


def _narrowest(region: Region) -> list[LSQFakeQuantize]:
    """The quantizers with the fewest bits: wider ones lose next to nothing, within bounds."""
    least = min((quantizer.bits for quantizer in region.quantizers), default=0)
    return [quantizer for quantizer in region.quantizers if quantizer.bits == least]


def _channel_values(
    student: fx.GraphModule, quantizers: list[LSQFakeQuantize], batches: Sequence[Tensor]
) -> dict[LSQFakeQuantize, Tensor]:
    """Values of each channel of what ``quantizers`` read, [channels, values], save where all are zero."""
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
    """Factors of the channels, [channels]; 1 on geometric average."""
    values = torch.cat([each / _ranges(each).mean() for each in tensors], 1)
    factor = _fitting(values, _narrowest(region)[0].integer_range.num_steps, _importance(region))
    shared = [_weight_ranges(sink) for sink in region.sinks if not _has_a_scale_for_each_channel(sink)]
    weights = torch.stack(shared).amax(0) if shared else torch.zeros(())
    if weights.any():  # sinks whose weights are all zero do not mind
        weights = weights.clamp(min=_NARROWEST * float(weights.max()))
        share = _share_of_activations(region)
        factor = factor**share * weights ** (1 - share)
    return factor / factor.log().mean().exp()


def _bounded(region: Region, factor: Tensor, narrow: list[Tensor], wider: dict[LSQFakeQuantize, Tensor]) -> Tensor:
    """``factor``, but none that makes the steps of a quantizer with more bits coarser than half those with fewest bits.

    What a ReLU hides counts there: a channel that is never active could have any factor for what is behind the ReLU,
    and would leave a quantizer before it no step for the others.
    """
    num_steps = _narrowest(region)[0].integer_range.num_steps
    narrow_step = max(float((factor * _ranges(values)).max()) for values in narrow) / num_steps
    for quantizer, values in wider.items():
        longest = quantizer.integer_range.num_steps * narrow_step / 2
        factor = torch.minimum(factor, longest / _ranges(values))
    return factor


def _share_of_activations(region: Region) -> float:
    """The share of the equalization that activations get, 0..1, where weights share a scale.

    Squared errors of a tensor are in inverse proportion to 4^bits, and what errs more gets more. MobileFaceNet, not
    trained, 1 - cosine over 516 faces: w6a6 0.0206 (share 0.5), 0.0201 (0.8), 0.0210 (0.9); w4a8 0.0566 (0.2), 0.0596
    (0.5), 0.0639 (0.8).
    """
    sinks = [sink for sink in region.sinks if not _has_a_scale_for_each_channel(sink)]
    weight_bits = min(sink.weight_bits for sink in sinks if isinstance(sink, WeightedLayer))
    weights = (1 - _SHARE_OF_ACTIVATIONS) * 4.0 ** (_narrowest(region)[0].bits - weight_bits)
    return _SHARE_OF_ACTIVATIONS / (_SHARE_OF_ACTIVATIONS + weights)


def _fitting(values: Tensor, num_steps: int, importance: Tensor) -> Tensor:
    """The factor of each channel, [channels], with which ``num_steps`` steps of 1 lose least.

    Args:
        values: of each channel, [channels, values].
        num_steps: from the least to the greatest integer.
        importance: of a squared error in each channel, [channels].
    """
    ranges = _ranges(values)
    middle = num_steps / ranges.clamp(min=_NARROWEST * float(ranges.max()))
    tried = [factor * middle for factor in _RELATIVE_FACTORS.tolist()]
    lows = [-round(share * num_steps) for share in _ZERO_POINTS.tolist()]
    errors = torch.stack([_errors(values, factor, lows, num_steps) for factor in tried])
    smallest = errors.min(0)  # of the factors, [zero points, channels]
    zero_point = int((smallest.values @ importance).argmin())
    best = torch.stack(tried).gather(0, smallest.indices[zero_point, None])[0]
    asleep = ranges == 0  # on these images; on others it may be as wide as the widest
    return torch.where(asleep, best[~asleep].min(), best)


def _errors(values: Tensor, factor: Tensor, lows: list[int], num_steps: int) -> Tensor:
    """Mean squared error of each channel, multiplied by ``factor`` and rounded to the integers from each of ``lows``
    on, [lows, channels]."""
    scaled = values * factor[:, None]
    rounded = scaled.round()
    errors = [(rounded.clamp(low, low + num_steps) - scaled).square_().mean(1) for low in lows]
    return torch.stack(errors) / factor.square()


def _importance(region: Region) -> Tensor:
    """The factor of a squared error in each channel after its sinks: the square of their weights, [channels]."""
    return torch.stack([_squared_weights(sink) for sink in region.sinks]).sum(0)


def _squared_weights(layer: Scalable) -> Tensor:
    squares = layer.weight.detach().square()
    if isinstance(layer, nn.Conv2d):
        return squares.reshape(layer.groups, -1, *squares.shape[1:]).sum((1, 3, 4)).flatten()
    return squares.sum(0) if isinstance(layer, nn.Linear) else squares


def _ranges(values: Tensor) -> Tensor:
    """From the least to the greatest of ``values`` [channels, values] but for the tails, zero included; [channels]."""
    tail = max(1, int(_TAIL * values.shape[1]))
    high, low = values.topk(tail).values[:, -1], values.topk(tail, largest=False).values[:, -1]
    return high.clamp(min=0) - low.clamp(max=0)


def _has_a_scale_for_each_channel(layer: Scalable) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == layer.in_channels
    return isinstance(layer, ChannelAffine)


def _weight_ranges(layer: Scalable) -> Tensor:
    """The magnitude of each input channel's weights relative to the greatest of their output, on average."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        weight = (
            weight.reshape(layer.groups, -1, *weight.shape[1:]).flatten(3).abs().amax(3)
        )  # [groups, outputs, inputs]
    else:
        weight = weight.abs().unsqueeze(0)
    greatest = weight.amax(2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / greatest).square().mean(1).sqrt().flatten()


def _multiply(region: Region, factor: Tensor) -> None:
    for source in region.sources:
        scale_outputs(source, factor)
    for sink in region.sinks:
        scale_inputs(sink, 1 / factor)
