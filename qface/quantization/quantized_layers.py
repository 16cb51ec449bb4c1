"""Quantized layers: fake quantization in training mode, deployed integer arithmetic in eval mode.

In training mode a convolution multiplies fake-quantized floats, with gradients. In eval mode it multiplies integers as
onnxruntime does (:mod:`qface.quantization.kernels`). For that, a layer needs the quantization parameters of its inputs
and output, which torch.ao keeps in separate modules; :mod:`qface.quantization.binding` sets them.
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
from qface.quantization.fake_quantize import (
    ImageFakeQuantize,
    LSQFakeQuantize,
    SharedScaleFakeQuantize,
    WeightFakeQuantize,
)
from qface.quantization.kernels import accumulate, choose_positive, requantize
from qface.quantization.lsq import prelu
from qface.quantization.qparams import shifts

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
# float32, in which the student trains, represents all integers up to here exactly.
MAX_BIAS = 2**24

Quantizer = ImageFakeQuantize | LSQFakeQuantize | SharedScaleFakeQuantize
LayerT = TypeVar("LayerT", bound=nn.Module)


@dataclass(frozen=True)
class QuantContext:
    """Quantizers of the inputs and the output of a layer; None for a float tensor."""

    inputs: tuple[Quantizer | None, ...] = (None,)
    output: Quantizer | None = None

    @property
    def complete(self) -> bool:
        """True if all inputs and the output are quantized."""
        return None not in (*self.inputs, self.output)

    @property
    def rounding(self) -> bool:
        """True if all inputs and the output are quantized, and fake quantization is on."""
        return self.complete and all(cast(Quantizer, quantizer).quantizing for quantizer in (*self.inputs, self.output))

    def output_shift(self) -> Tensor | None:
        """Return by how much each output channel's zero point exceeds the tensor's, int32 [C]; None for nothing."""
        output = self.output
        if isinstance(output, SharedScaleFakeQuantize):
            output = output.owner
        if not isinstance(output, LSQFakeQuantize) or output.num_zero_points == 1 or not output.quantizing:
            return None
        return shifts(output.zero_point)

    def output_offset(self) -> Tensor | float:
        """Return the magnitude of :meth:`output_shift` as a value, [C]; 0 for nothing."""
        shift = self.output_shift()
        return 0.0 if shift is None else shift.abs() * cast(Quantizer, self.output).qparams().scale

    def scales(self) -> tuple[Tensor, ...]:
        """Return the scales of inputs and output, which must all be quantized."""
        return tuple(cast(Quantizer, quantizer).qparams().scale for quantizer in (*self.inputs, self.output))


def _minimum_step(offset: Tensor, input_scale: Tensor) -> Tensor:
    """Return the smallest weight scale with which a bias of magnitude ``offset`` fits its integer, with reserve."""
    return offset / (MAX_BIAS / 2 * input_scale)


def _bias_integers(bias: Tensor, step: Tensor) -> Tensor:
    """Return ``bias`` in units of ``step``, input scale x weight scale; integers as float32 [C]."""
    return (bias / step).round_().clamp_(-MAX_BIAS, MAX_BIAS)


def _shift_integers(shift: Tensor, step: Tensor, output_scale: Tensor) -> Tensor:
    """Return the shift of the output's zero points in units of ``step``, as a bias; integers as float32 [C]."""
    return (shift * (output_scale / step)).round().clamp_(-MAX_BIAS, MAX_BIAS)


def _take_weights(target: LayerT, source: nn.Module) -> LayerT:
    """Move the parameters of ``source`` into ``target``."""
    target._parameters.update(source._parameters)
    target.train(source.training)
    return target.to(cast(Tensor, source.weight).device)


def _weight_settings(layer: nn.Module) -> dict[str, Any]:
    """Return the weight quantizer's settings in the qconfig of ``layer``, as constructor arguments."""
    quantizer: LSQFakeQuantize = cast(Any, layer.qconfig).weight()
    return {
        "weight_bits": quantizer.bits,
        "weight_observer": quantizer.observer,
        "percentile": quantizer.percentile,
    }


class _QuantizedMatmul(nn.Module):
    """Base of quantized convolution and linear layer: int32 bias, and integer arithmetic in eval mode."""

    weight: Any
    bias: Any
    weight_fake_quant: WeightFakeQuantize
    quant_context = QuantContext()

    # Saving a graph needs the constructor arguments back; the quantizer has them.
    @property
    def weight_bits(self) -> int:
        """Bits of the weight."""
        return self.weight_fake_quant.bits

    @property
    def weight_observer(self) -> str:
        """Name of the weight observer."""
        return self.weight_fake_quant.observer

    @property
    def percentile(self) -> float:
        """Percentage of the weights inside the range, for the observer ``"percentile"``."""
        return self.weight_fake_quant.percentile

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve or multiply ``x`` with ``weight`` and add ``bias``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: differentiable in training mode, the deployed integer arithmetic in eval mode."""
        if self.training or not self._has_integer_products:
            return self.simulate(input)
        with torch.no_grad():
            return self._deployed(input)

    def simulate(self, input: Tensor) -> Tensor:
        """Apply the layer to fake-quantized values in float, before the output is quantized."""
        return self.multiply(input, self.weight_fake_quant(self.weight), self.used_bias())

    def in_steps(self, values: Tensor) -> Tensor:
        """Round output ``values`` to the steps of the output quantizer, without a clamp."""
        output = self.quant_context.output
        if output is None or not output.quantizing:
            return values
        scale = output.qparams().scale
        return (values / scale).round_().mul_(scale)

    @property
    def _has_integer_products(self) -> bool:
        """True if its input and weight are quantized."""
        (quantizer,) = self.quant_context.inputs
        return quantizer is not None and quantizer.quantizing and self.weight_fake_quant.quantizing

    def used_bias(self) -> Tensor | None:
        """Return the bias in use, rounded for integer products; the gradient passes straight through."""
        if not self._has_integer_products:
            return cast("Tensor | None", self.bias)
        rounded = self.rounded_bias()
        if self.bias is None or rounded is None:
            return rounded
        return cast(Tensor, self.bias + (rounded - self.bias).detach())

    @torch.no_grad()
    def rounded_bias(self) -> Tensor | None:
        """Return the bias that the integer kernel adds, float32 [C], with the error of a rounded shift."""
        step, shift = self._step(), self.quant_context.output_shift()
        rounded = None if self.bias is None else _bias_integers(self.bias, step) * step
        if shift is None:
            return rounded
        output_scale = self._output_scale()
        error = _shift_integers(shift, step, output_scale) * step - shift * output_scale
        return error if rounded is None else rounded + error

    @torch.no_grad()
    def bias_integers(self) -> Tensor | None:
        """Return the bias in units of input scale x weight scale, integers as float32 [C]."""
        return None if self.bias is None else _bias_integers(self.bias, self._step())

    @torch.no_grad()
    def minimum_weight_scale(self) -> Tensor:
        """Return the smallest weight scale with which the bias fits its integer, [C]; 0 for a float input."""
        (quantizer,) = self.quant_context.inputs
        if quantizer is None:
            return torch.zeros_like(self.weight_fake_quant.scale)
        magnitude = torch.zeros_like(self.weight_fake_quant.scale) if self.bias is None else self.bias.abs()
        return _minimum_step(magnitude + self.quant_context.output_offset(), quantizer.qparams().scale)

    def _output_scale(self) -> Tensor:
        return cast(Quantizer, self.quant_context.output).qparams().scale

    def _step(self) -> Tensor:
        (quantizer,) = self.quant_context.inputs
        assert quantizer is not None
        return quantizer.qparams().scale * self.weight_fake_quant.exact_scale()

    def _deployed(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quant.integers(self.weight)
        bias, shift = self.bias_integers(), self.quant_context.output_shift()
        if shift is not None:
            moved = _shift_integers(shift, self._step(), self._output_scale())
            bias = moved if bias is None else bias + moved
        scale = cast(Quantizer, self.quant_context.inputs[0]).qparams().scale
        shape = (-1,) + (1,) * (self.weight.ndim - 2)
        sums = accumulate(self.multiply, (x / scale).round_(), weight, None if bias is None else bias.view(shape))
        weight_scale = self.weight_fake_quant.exact_scale().view(shape)
        output = self.quant_context.output
        if output is None or not output.quantizing:
            return sums * (scale * weight_scale)
        output_scale = output.qparams().scale
        shift = None if shift is None else shift.view(shape)
        return requantize(sums, scale, weight_scale, output_scale, shift).mul_(output_scale)


class QuantizedConv2d(_QuantizedMatmul, nn.Conv2d):
    """``nn.Conv2d`` with a per-channel fake-quantized weight.

    Args:
        *args: arguments of ``nn.Conv2d``.
        weight_bits: bits of the weight, 2 to 8.
        weight_observer: name of the weight observer.
        percentile: percentage of the weights inside the range, for the observer ``"percentile"``.
        **kwargs: arguments of ``nn.Conv2d``.
    """

    def __init__(
        self, *args: Any, weight_bits: int = 8, weight_observer: str = "mse", percentile: float = 99.99, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_fake_quant = WeightFakeQuantize(weight_bits, self.out_channels, weight_observer, percentile)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve ``x`` with ``weight`` and add ``bias``."""
        return cast(Tensor, self._conv_forward(x, weight, bias))

    @classmethod
    def from_float(cls, layer: nn.Conv2d) -> QuantizedConv2d:
        """Return the quantized form of ``layer``, which has a ``qconfig``; torch.ao calls this to swap layers."""
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
        in_features: number of input features.
        out_features: number of output features.
        bias: True to add a bias.
        weight_bits: bits of the weight, 2 to 8.
        weight_observer: name of the weight observer.
        percentile: percentage of the weights inside the range, for the observer ``"percentile"``.
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
        self.weight_fake_quant = WeightFakeQuantize(weight_bits, out_features, weight_observer, percentile)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply ``x`` by the transposed ``weight`` and add ``bias``."""
        return F.linear(x, weight, bias)

    @classmethod
    def from_float(cls, layer: nn.Linear) -> QuantizedLinear:
        """Return the quantized form of ``layer``, which has a ``qconfig``; torch.ao calls this to swap layers."""
        target = cls(layer.in_features, layer.out_features, layer.bias is not None, **_weight_settings(layer))
        return _take_weights(target, layer)


class QuantizedPReLU(nn.PReLU):
    """``nn.PReLU`` with 8-bit slopes and one scale for all channels.

    Args:
        num_parameters: number of slopes: 1, or the number of channels.
    """

    weight_fake_quant: LSQFakeQuantize
    quant_context = QuantContext()

    def __init__(self, num_parameters: int = 1) -> None:
        super().__init__(num_parameters)
        self.weight_fake_quant = LSQFakeQuantize(SLOPE_BITS, num_channels=1, observer="minmax")

    def forward(self, input: Tensor) -> Tensor:
        """Apply PReLU to ``input`` [N, C, ...]."""
        if not self.training and self.quant_context.rounding:
            with torch.no_grad():
                return self._deployed(input, *self.quant_context.scales())
        slopes = self.weight_fake_quant(self.weight.unsqueeze(0)).squeeze(0)
        output = self.quant_context.output
        if isinstance(output, LSQFakeQuantize) and output.rounds_within_prelu:
            return output.prelu(input, slopes)
        return prelu(input, slopes)

    def slope_integers(self) -> Tensor:
        """Return the quantized slopes, integers as floats [C]."""
        return self.weight_fake_quant.integers(self.weight.unsqueeze(0)).squeeze(0)

    def _deployed(self, x: Tensor, scale: Tensor, output_scale: Tensor) -> Tensor:
        integers = (x / scale).round_()
        slopes, slope_scale = along_channels(self.slope_integers(), x), self.weight_fake_quant.exact_scale()
        products, shift = integers * slopes, self.quant_context.output_shift()
        if shift is not None:  # input and output share one scale
            shift = along_channels(shift, x)
            products.add_((shift / slope_scale).round())
        scaled = requantize(products, scale, slope_scale, output_scale, shift)
        kept = requantize(integers.clone(), scale, torch.ones_like(scale), output_scale)
        return choose_positive(integers, kept, scaled).mul_(output_scale)

    @classmethod
    def from_float(cls, layer: nn.PReLU) -> QuantizedPReLU:
        """Return the quantized form of ``layer``; torch.ao calls this to swap layers."""
        return _take_weights(cls(layer.num_parameters), layer)


class QuantizedGlobalAveragePool(nn.AdaptiveAvgPool2d):
    """Global average pooling; in eval mode the sum is exact for feature maps of any size.

    Args:
        num_values: height x width of the feature map.
    """

    def __init__(self, num_values: int) -> None:
        super().__init__(1)
        self.num_values = num_values

    def forward(self, input: Tensor) -> Tensor:
        """Average ``input`` [N, C, H, W] to [N, C, 1, 1]."""
        if self.training:
            return super().forward(input)
        return super().forward(input.double()).to(input.dtype)


class QuantizedAffine(ChannelAffine):
    """Per-channel affine layer ``weight[c] * x + bias[c]``, deployed as a depthwise 1x1 convolution.

    Its 8-bit weights are lossless, since each channel has its own scale.
    """

    quant_context = QuantContext()

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of ``x``."""
        if self.training or not self.quant_context.rounding:
            return super().forward(x)
        with torch.no_grad():
            return self._deployed(x, *self.quant_context.scales())

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return integer weights, their scales, and integer biases, each float [C].

        Biases are in units of input scale x weight scale.
        """
        input_scale, output_scale = self.quant_context.scales()
        quant_max = (1 << (AFFINE_BITS - 1)) - 1
        # If a channel is dominated by its bias, the step must be large enough for the bias to fit its integer.
        offset = self.bias.abs() + self.quant_context.output_offset()
        step = torch.maximum(self.weight.abs() / quant_max, _minimum_step(offset, input_scale))
        step = step.clamp(min=torch.finfo(step.dtype).tiny)
        step = exact_weight_scale(step, input_scale, output_scale).to(step.dtype)
        return (self.weight / step).round(), step, (self.bias / (input_scale * step)).round()

    def _deployed(self, x: Tensor, scale: Tensor, output_scale: Tensor) -> Tensor:
        weight, weight_scale, bias = self.integers()
        shift = self.quant_context.output_shift()
        if shift is not None:
            bias = bias + _shift_integers(shift, scale * weight_scale, output_scale)
            shift = along_channels(shift, x)
        weight, weight_scale, bias = (along_channels(values, x) for values in (weight, weight_scale, bias))
        sums = accumulate(torch.mul, (x / scale).round_(), weight, bias)
        return requantize(sums, scale, weight_scale, output_scale, shift).mul_(output_scale)

    @classmethod
    def from_float(cls, layer: ChannelAffine) -> QuantizedAffine:
        """Return the quantized form of ``layer``."""
        target = cls(layer.num_channels, layer.dim)
        target._parameters.update(layer._parameters)
        return target.train(layer.training)


WeightedLayer = (QuantizedConv2d, QuantizedLinear)
"""Convolution and linear layers; their inputs have ``activation_bits``."""


def is_quantizer(node: fx.Node) -> bool:
    """Return True if ``node`` is a quantizer."""
    return isinstance(layer_of(node), Quantizer)
