"""Layers that train on rounded values, and in eval mode compute what is deployed, bit for bit.

In training mode a convolution multiplies rounded floats, differentiably. In eval mode it multiplies the
integers, as onnxruntime does (:mod:`qface.quantization.kernels`). For that a layer must know the qparams of what it
reads and of what it makes, which torch.ao keeps in neighboring modules: :mod:`qface.quantization.binding` tells every
layer its quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qface.graph.layers import ChannelAffine, along_channels
from qface.graph.queries import layer_of
from qface.quantization.exact_scales import exact_weight_scale
from qface.quantization.fake_quantize import ImageFakeQuantize, LSQFakeQuantize, SharedScaleFakeQuantize
from qface.quantization.kernels import accumulate, requantize
from qface.quantization.lsq import prelu

__all__ = [
    "MAX_BIAS",
    "QuantContext",
    "QuantizedAffine",
    "QuantizedConv2d",
    "QuantizedGlobalAveragePool",
    "QuantizedLinear",
    "QuantizedPReLU",
    "WeightedLayer",
    "is_quantizer",
]

SLOPE_BITS = 8
AFFINE_BITS = 8
# Integers up to here are exact in float32, in which the student trains.
MAX_BIAS = 2**24

Quantizer = ImageFakeQuantize | LSQFakeQuantize | SharedScaleFakeQuantize
LayerT = TypeVar("LayerT", bound=nn.Module)


@dataclass(frozen=True)
class QuantContext:
    """The quantizers of what a layer reads and of what it makes; None where a value stays float."""

    inputs: tuple[Quantizer | None, ...] = (None,)
    output: Quantizer | None = None

    @property
    def complete(self) -> bool:
        """True if no value stays float."""
        return None not in (*self.inputs, self.output)

    @property
    def rounding(self) -> bool:
        """True if no value stays float and all quantizers are switched on."""
        return self.complete and all(cast(Quantizer, quantizer).quantizing for quantizer in (*self.inputs, self.output))

    def scales(self) -> tuple[Tensor, ...]:
        """The scales of inputs and output; no value may stay float."""
        return tuple(cast(Quantizer, quantizer).qparams().scale for quantizer in (*self.inputs, self.output))


def _take_weights(target: LayerT, source: nn.Module) -> LayerT:
    """Move the parameters of ``source`` into ``target``."""
    target._parameters.update(source._parameters)
    target.train(source.training)
    return target.to(cast(Tensor, source.weight).device)


def _weight_settings(layer: nn.Module) -> dict[str, Any]:
    """The settings of the weight's quantizer in the qconfig of ``layer``, as constructors take them."""
    quantizer: LSQFakeQuantize = cast(Any, layer.qconfig).weight()
    return {
        "weight_bits": quantizer.bits,
        "weight_observer": quantizer.observer,
        "percentile": quantizer.percentile,
    }


class _QuantizedMatmul(nn.Module):
    """Base of convolution and linear layer: the bias as int32, and the integer path of eval mode."""

    weight: Any
    bias: Any
    weight_fake_quant: LSQFakeQuantize
    quant_context = QuantContext()

    # What the constructor was told, read back from the quantizer, as saving a graph needs it.
    @property
    def weight_bits(self) -> int:
        """Bits of the weight."""
        return self.weight_fake_quant.bits

    @property
    def weight_observer(self) -> str:
        """The observers of its ranges."""
        return self.weight_fake_quant.observer

    @property
    def percentile(self) -> float:
        """For the observer ``"percentile"``."""
        return self.weight_fake_quant.percentile

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sum of products of this layer."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The quantized layer: differentiable in training mode, exactly what is deployed in eval mode."""
        if self.training or not self._rounds_sums:
            return self.simulate(input)
        with torch.no_grad():
            return self._deployed(input)

    def simulate(self, input: Tensor) -> Tensor:
        """The products of rounded values, in float and before they are rounded to what this layer makes."""
        return self.multiply(input, self.weight_fake_quant(self.weight), self.used_bias())

    def in_steps(self, values: Tensor) -> Tensor:
        """``values`` of what this layer makes, rounded to the steps of its quantizer but not clamped."""
        output = self.quant_context.output
        if output is None or not output.quantizing:
            return values
        scale = output.qparams().scale
        return (values / scale).round_().mul_(scale)

    @property
    def _rounds_sums(self) -> bool:
        """True if what it reads and its weights are integers."""
        (quantizer,) = self.quant_context.inputs
        return quantizer is not None and quantizer.quantizing and self.weight_fake_quant.quantizing

    def used_bias(self) -> Tensor | None:
        """The bias that is added, rounded where products are integers; its gradient passes to ``bias`` unchanged."""
        if self.bias is None or not self._rounds_sums:
            return cast("Tensor | None", self.bias)
        return cast(Tensor, self.bias + (cast(Tensor, self.rounded_bias()) - self.bias).detach())

    @torch.no_grad()
    def rounded_bias(self) -> Tensor | None:
        """The bias that the integer kernel adds, as floats [out_channels]."""
        integers = self.bias_integers()
        return None if integers is None else integers * self._step()

    @torch.no_grad()
    def bias_integers(self) -> Tensor | None:
        """The bias in units of input scale x weight scale, as float32 integers [out_channels]."""
        if self.bias is None:
            return None
        return cast(Tensor, self.bias / self._step()).round_().clamp_(-MAX_BIAS, MAX_BIAS)

    def _step(self) -> Tensor:
        (quantizer,) = self.quant_context.inputs
        assert quantizer is not None
        return quantizer.qparams().scale * self.weight_fake_quant.exact_scale()

    def _deployed(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quant.integers(self.weight)
        bias = self.bias_integers()
        scale = cast(Quantizer, self.quant_context.inputs[0]).qparams().scale
        shape = (-1,) + (1,) * (self.weight.ndim - 2)
        sums = accumulate(self.multiply, (x / scale).round_(), weight, None if bias is None else bias.view(shape))
        weight_scale = self.weight_fake_quant.exact_scale().view(shape)
        output = self.quant_context.output
        if output is None or not output.quantizing:
            return sums * (scale * weight_scale)
        output_scale = output.qparams().scale
        return requantize(sums, scale, weight_scale, output_scale).mul_(output_scale)


class QuantizedConv2d(_QuantizedMatmul, nn.Conv2d):
    """``nn.Conv2d`` with a per-channel fake-quantized weight.

    Args:
        *args: of ``nn.Conv2d``.
        weight_bits: of the weight, 2 to 8.
        weight_observer: how its ranges are chosen.
        percentile: for the observer ``"percentile"``.
        **kwargs: of ``nn.Conv2d``.
    """

    def __init__(
        self, *args: Any, weight_bits: int = 8, weight_observer: str = "mse", percentile: float = 99.99, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_fake_quant = LSQFakeQuantize(weight_bits, self.out_channels, weight_observer, percentile)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve."""
        return cast(Tensor, self._conv_forward(x, weight, bias))

    @classmethod
    def from_float(cls, layer: nn.Conv2d) -> QuantizedConv2d:
        """Make the quantized layer of ``layer``, which carries a ``qconfig``; torch.ao calls this to swap layers."""
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
            **_weight_settings(layer),
        )
        return _take_weights(target, layer)


class QuantizedLinear(_QuantizedMatmul, nn.Linear):
    """``nn.Linear`` with a per-channel fake-quantized weight.

    Args:
        in_features: of ``nn.Linear``.
        out_features: of ``nn.Linear``.
        bias: of ``nn.Linear``.
        weight_bits: of the weight, 2 to 8.
        weight_observer: how its ranges are chosen.
        percentile: for the observer ``"percentile"``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_bits: int = 8,
        weight_observer: str = "mse",
        percentile: float = 99.99,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_fake_quant = LSQFakeQuantize(weight_bits, out_features, weight_observer, percentile)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply with the transposed weight."""
        return F.linear(x, weight, bias)

    @classmethod
    def from_float(cls, layer: nn.Linear) -> QuantizedLinear:
        """Make the quantized layer of ``layer``, which carries a ``qconfig``; torch.ao calls this to swap layers."""
        target = cls(layer.in_features, layer.out_features, layer.bias is not None, **_weight_settings(layer))
        return _take_weights(target, layer)


class QuantizedPReLU(nn.PReLU):
    """``nn.PReLU`` whose slopes have 8 bits, and one scale for all channels."""

    weight_fake_quant: LSQFakeQuantize
    quant_context = QuantContext()

    def __init__(self, num_parameters: int = 1) -> None:
        super().__init__(num_parameters)
        self.weight_fake_quant = LSQFakeQuantize(SLOPE_BITS, num_channels=1, observer="minmax")

    def forward(self, input: Tensor) -> Tensor:
        """``x`` where it is positive, else slope times ``x``."""
        if not self.training and self.quant_context.rounding:
            with torch.no_grad():
                return self._deployed(input, *self.quant_context.scales())
        slopes = self.weight_fake_quant(self.weight.unsqueeze(0)).squeeze(0)
        output = self.quant_context.output
        if isinstance(output, LSQFakeQuantize) and output.rounds_within_prelu:
            return output.prelu(input, slopes)
        return prelu(input, slopes)

    def slope_integers(self) -> Tensor:
        """The slopes in units of their scale, as floats [channels]."""
        return self.weight_fake_quant.integers(self.weight.unsqueeze(0)).squeeze(0)

    def _deployed(self, x: Tensor, scale: Tensor, output_scale: Tensor) -> Tensor:
        integers = (x / scale).round_()
        slopes = along_channels(self.slope_integers(), x)
        scaled = requantize(integers * slopes, scale, self.weight_fake_quant.exact_scale(), output_scale)
        kept = requantize(integers.clone(), scale, torch.ones_like(scale), output_scale)
        return torch.where(integers > 0, kept, scaled).mul_(output_scale)

    @classmethod
    def from_float(cls, layer: nn.PReLU) -> QuantizedPReLU:
        """Make the quantized layer of ``layer``; torch.ao calls this to swap layers."""
        return _take_weights(cls(layer.num_parameters), layer)


class QuantizedGlobalAveragePool(nn.AdaptiveAvgPool2d):
    """Mean over height and width, which become 1; in eval mode no sum is rounded, however large the map.

    Args:
        num_values: height x width of the map.
    """

    def __init__(self, num_values: int) -> None:
        super().__init__(1)
        self.num_values = num_values

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, 1, 1]."""
        if self.training:
            return super().forward(input)
        return super().forward(input.double()).to(input.dtype)


class QuantizedAffine(ChannelAffine):
    """``weight[c] * x + bias[c]``, deployed as a depthwise 1x1 convolution.

    Weights of 8 bits lose nothing there, since each channel has a scale of its own.
    """

    quant_context = QuantContext()

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        if self.training or not self.quant_context.rounding:
            return super().forward(x)
        with torch.no_grad():
            return self._deployed(x, *self.quant_context.scales())

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, their scales, and biases in units of input scale x weight scale, each [channels], as floats."""
        input_scale, output_scale = self.quant_context.scales()
        greatest = (1 << (AFFINE_BITS - 1)) - 1
        # A channel that is next to nothing but shift gets a step in which the shift fits its integer.
        step = torch.maximum(self.weight.abs() / greatest, self.bias.abs() / (input_scale * MAX_BIAS / 2))
        step = step.clamp(min=torch.finfo(step.dtype).tiny)
        step = exact_weight_scale(step, input_scale, output_scale).to(step.dtype)
        return (self.weight / step).round(), step, (self.bias / (input_scale * step)).round()

    def _deployed(self, x: Tensor, scale: Tensor, output_scale: Tensor) -> Tensor:
        weight, weight_scale, bias = (along_channels(values, x) for values in self.integers())
        sums = accumulate(torch.mul, (x / scale).round_(), weight, bias)
        return requantize(sums, scale, weight_scale, output_scale).mul_(output_scale)

    @classmethod
    def from_float(cls, layer: ChannelAffine) -> QuantizedAffine:
        """The same map, which will know its quantizers."""
        target = cls(layer.num_channels, layer.dim)
        target._parameters.update(layer._parameters)
        return target.train(layer.training)


WeightedLayer = (QuantizedConv2d, QuantizedLinear)
"""Layers that multiply: what they read has ``activation_bits``."""


def is_quantizer(node: fx.Node) -> bool:
    """True if ``node`` rounds a value."""
    return isinstance(layer_of(node), Quantizer)
