"""Cross-layer equalisation: the channels of a tensor brought to one range, so that they share a grid without loss.

A tensor has one scale, and its widest channel decides it. A factor for each channel passes through sums and through
activation functions that are homogeneous, into the weights before and behind them (Nagel et al., Data-Free
Quantization, ICCV 2019), so that the network computes what it did. A depthwise convolution or a BatchNorm behind the
tensor takes any factor without loss, since each of its channels has a scale of its own: there all channels get the same
range. Any other layer holds the weights of all channels that it reads on one scale: there activations and weights
share what is to be evened out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qface.models.layers import Add, ChannelAffine
from qface.quantization.channel_factors import Scalable, scale_inputs, scale_outputs
from qface.quantization.fake_quantize import LowBitFakeQuantize
from qface.quantization.layers import is_quantizer, layer_of

__all__ = ["ChannelGroup", "channel_groups", "equalise"]

_TAIL = 1e-3
"""Share of a channel's values on either side that may lie beyond its range; a tenth or ten times of it does as well."""
_NARROWEST = 1e-3  # of the widest channel's range: what is less is a channel that is never active

_PASSES_FACTORS = (nn.PReLU, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, Add)


@dataclass
class ChannelGroup:
    """Tensors whose channels can only be multiplied by the same factors.

    Args:
        makers: layers whose outputs they are.
        readers: layers that read them.
        quantizers: that round them, where they have a range of their own.
        closed: whether nothing else makes or reads them.
    """

    makers: list[Scalable] = field(default_factory=list)
    readers: list[Scalable] = field(default_factory=list)
    quantizers: list[LowBitFakeQuantize] = field(default_factory=list)
    closed: bool = True


def channel_groups(student: fx.GraphModule) -> list[ChannelGroup]:
    """All groups through which factors can pass."""
    groups = _Groups()
    rows: set[fx.Node] = set()  # tensors [N, channels]
    for node in student.graph.nodes:
        layer = layer_of(node)
        inputs = node.all_input_nodes
        if isinstance(layer, nn.Flatten) or (inputs and rows.issuperset(inputs)):
            rows.add(node)
        if is_quantizer(node) or isinstance(layer, _PASSES_FACTORS):
            for source in inputs:
                groups.join(node, source)
            if isinstance(layer, LowBitFakeQuantize):
                groups.of(node).quantizers.append(layer)
        elif isinstance(layer, Scalable) and (node in rows or not isinstance(layer, nn.Linear)):
            groups.of(inputs[0]).readers.append(layer)
            groups.of(node).makers.append(layer)
        else:
            for tensor in (node, *inputs):
                groups.of(tensor).closed = False
    return [group for group in groups.all() if group.closed and group.makers and group.readers]


class _Groups:
    """A group for each node's tensor; joined ones share it."""

    def __init__(self) -> None:
        self._groups: dict[fx.Node, ChannelGroup] = {}

    def of(self, node: fx.Node) -> ChannelGroup:
        return self._groups.setdefault(node, ChannelGroup())

    def all(self) -> list[ChannelGroup]:
        return list({id(group): group for group in self._groups.values()}.values())

    def join(self, one: fx.Node, other: fx.Node) -> None:
        kept, merged = self.of(one), self.of(other)
        if kept is merged:
            return
        kept.makers += merged.makers
        kept.readers += merged.readers
        kept.quantizers += merged.quantizers
        kept.closed &= merged.closed
        self._groups = {node: kept if group is merged else group for node, group in self._groups.items()}


def equalise(student: fx.GraphModule, images: Tensor) -> None:
    """Bring the channels of every tensor of ``student`` to one range, in place; its quantizers must be off.

    Args:
        student: what :func:`qface.quantize` returned.
        images: normalised, float32 [N, 3, height, width]; all at once.
    """
    groups = channel_groups(student)
    ranges = _channel_ranges(student, [quantizer for group in groups for quantizer in group.quantizers], images)
    for group in groups:
        found = [ranges[quantizer] for quantizer in group.quantizers if quantizer in ranges]
        if found:
            _multiply(group, _factors(group, torch.stack([each / each.mean() for each in found]).amax(0)))


def _channel_ranges(
    student: fx.GraphModule, quantizers: list[LowBitFakeQuantize], images: Tensor
) -> dict[LowBitFakeQuantize, Tensor]:
    """The range of each channel of what ``quantizers`` read, [channels], save where all is zero."""
    ranges: dict[LowBitFakeQuantize, Tensor] = {}

    def look(quantizer: nn.Module, inputs: tuple[Any, ...]) -> None:
        ranges[cast(LowBitFakeQuantize, quantizer)] = _ranges(inputs[0])

    hooks = [quantizer.register_forward_pre_hook(look) for quantizer in quantizers]
    try:
        student(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {quantizer: found for quantizer, found in ranges.items() if found.max() > 0}


def _ranges(x: Tensor) -> Tensor:
    """From the least to the greatest value of each channel but for the tails, zero included; ``x`` is [N, C, ...]."""
    values = x.detach().transpose(0, 1).flatten(1)
    tail = max(1, int(_TAIL * values.shape[1]))
    high, low = values.topk(tail).values[:, -1], values.topk(tail, largest=False).values[:, -1]
    return high.clamp(min=0) - low.clamp(max=0)


def _factors(group: ChannelGroup, ranges: Tensor) -> Tensor:
    """What to multiply the channels by, [channels]; 1 on geometric average."""
    inverse = 1 / ranges.clamp(min=_NARROWEST * float(ranges.max()))
    shared = [_weight_ranges(reader) for reader in group.readers if not _has_a_scale_for_each_channel(reader)]
    if shared:
        weights = torch.stack(shared).amax(0)
        inverse = (inverse * weights.clamp(min=_NARROWEST * float(weights.max()))).sqrt()
    return inverse / inverse.log().mean().exp()


def _has_a_scale_for_each_channel(layer: Scalable) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == layer.in_channels
    return isinstance(layer, ChannelAffine)


def _weight_ranges(layer: Scalable) -> Tensor:
    """How large the weights of each input channel are, in parts of the greatest of their output, on average."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        weight = weight.view(layer.groups, -1, *weight.shape[1:]).flatten(3).abs().amax(3)  # [groups, outputs, inputs]
    else:
        weight = weight.abs().unsqueeze(0)
    greatest = weight.amax(2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / greatest).square().mean(1).sqrt().flatten()


def _multiply(group: ChannelGroup, factor: Tensor) -> None:
    for maker in group.makers:
        scale_outputs(maker, factor)
    for reader in group.readers:
        scale_inputs(reader, 1 / factor)
