"""Layers that train on the low-bit grid: convolution, linear and PReLU with fake-quantized weights.

Convolution and linear also round their bias to the int32 grid that the integer kernel adds it on, ``input scale x weight
scale``, because half a step there can move an output of the deployed layer by one.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.quantization.fake_quantize import LowBitFakeQuantize

__all__ = ["QuantizedConv2d", "QuantizedLinear", "QuantizedPReLU", "WeightedLayer", "bias_integers"]

SLOPE_BITS = 8
# Integers up to here are exact in float32, in which the student trains.
MAX_BIAS = 2**24

LayerT = TypeVar("LayerT", bound=nn.Module)


def bias_integers(bias: Tensor, input_scale: Tensor | float, weight_scale: Tensor) -> Tensor:
    """``bias`` [channels] in units of ``input_scale * weight_scale``, rounded, as float32 integers."""
    step = input_scale * weight_scale
    return (bias / step).round().clamp(-MAX_BIAS, MAX_BIAS)


def _bias_on_grid(
    bias: Tensor | None, input_scale: Tensor | float | None, quantizer: LowBitFakeQuantize
) -> Tensor | None:
    """The bias that the integer kernel adds; its gradient passes to ``bias`` unchanged."""
    if bias is None or input_scale is None or not quantizer.quantizing:
        return bias
    with torch.no_grad():
        rounded = bias_integers(bias, input_scale, quantizer.scale) * (input_scale * quantizer.scale)
    return bias + (rounded - bias).detach()


def _take_weights(target: LayerT, source: nn.Module, quantizer: Any) -> LayerT:
    """Move the parameters of ``source`` into ``target`` and give it a quantizer of its qconfig."""
    target._parameters.update(source._parameters)
    target.weight_fake_quant = quantizer
    target.train(source.training)
    return target.to(cast(Tensor, source.weight).device)


class _QuantizedWeight(nn.Module):
    """What the constructor was told, read back from the quantizer, as saving a graph needs it."""

    weight_fake_quant: LowBitFakeQuantize

    @property
    def weight_bits(self) -> int:
        """Width of the weight."""
        return self.weight_fake_quant.bits

    @property
    def weight_rule(self) -> str:
        """How its ranges are chosen."""
        return self.weight_fake_quant.rule

    @property
    def percentile(self) -> float:
        """For the rule ``"percentile"``."""
        return self.weight_fake_quant.percentile


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` with a per-channel fake-quantized weight.

    Args:
        *args: of ``nn.Conv2d``.
        weight_bits: width of the weight, 2 to 8.
        weight_rule: how its ranges are chosen.
        percentile: for the rule ``"percentile"``.
        **kwargs: of ``nn.Conv2d``.
    """

    def __init__(
        self,
        *args: Any,
        weight_bits: int = 8,
        weight_rule: str = "mse",
        percentile: float = 99.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_fake_quant = LowBitFakeQuantize(weight_bits, self.out_channels, weight_rule, percentile)

    def forward(self, input: Tensor, input_scale: Tensor | float | None = None) -> Tensor:
        """Convolve on the grid; ``input_scale`` is the scale of the quantizer that made ``input``."""
        bias = _bias_on_grid(self.bias, input_scale, self.weight_fake_quant)
        return self._conv_forward(input, self.weight_fake_quant(self.weight), bias)

    @classmethod
    def from_float(cls, layer: nn.Conv2d) -> QuantizedConv2d:
        """What torch.ao calls to swap ``layer``, which carries a ``qconfig``."""
        target = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
        )
        quantizer = cast(Any, layer.qconfig).weight(channels=layer.out_channels)
        return _take_weights(target, layer, quantizer)


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """``nn.Linear`` with a per-channel fake-quantized weight.

    Args:
        in_features: of ``nn.Linear``.
        out_features: of ``nn.Linear``.
        bias: of ``nn.Linear``.
        weight_bits: width of the weight, 2 to 8.
        weight_rule: how its ranges are chosen.
        percentile: for the rule ``"percentile"``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_bits: int = 8,
        weight_rule: str = "mse",
        percentile: float = 99.99,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_fake_quant = LowBitFakeQuantize(weight_bits, out_features, weight_rule, percentile)

    def forward(self, input: Tensor, input_scale: Tensor | float | None = None) -> Tensor:
        """Multiply on the grid; ``input_scale`` is the scale of the quantizer that made ``input``."""
        bias = _bias_on_grid(self.bias, input_scale, self.weight_fake_quant)
        return F.linear(input, self.weight_fake_quant(self.weight), bias)

    @classmethod
    def from_float(cls, layer: nn.Linear) -> QuantizedLinear:
        """What torch.ao calls to swap ``layer``, which carries a ``qconfig``."""
        target = cls(layer.in_features, layer.out_features, layer.bias is not None)
        return _take_weights(target, layer, cast(Any, layer.qconfig).weight(channels=layer.out_features))


class QuantizedPReLU(nn.PReLU):
    """``nn.PReLU`` whose slopes lie on an 8-bit grid of their own, one scale for all channels."""

    weight_fake_quant: LowBitFakeQuantize

    def __init__(self, num_parameters: int = 1) -> None:
        super().__init__(num_parameters)
        self.weight_fake_quant = LowBitFakeQuantize(SLOPE_BITS, channels=1, rule="minmax")

    def forward(self, input: Tensor) -> Tensor:
        """``x`` where it is positive, else slope times ``x``."""
        return F.prelu(input, self.weight_fake_quant(self.weight.unsqueeze(0)).squeeze(0))

    @classmethod
    def from_float(cls, layer: nn.PReLU) -> QuantizedPReLU:
        """What torch.ao calls to swap ``layer``."""
        target = cls(layer.num_parameters)
        return _take_weights(target, layer, target.weight_fake_quant)


WeightedLayer = (QuantizedConv2d, QuantizedLinear)
"""Layers that multiply: what they read has the activation width."""
