"""Fake quantization with learned scales (LSQ)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase

from qface.checks import check_whole
from qface.errors import ConfigError
from qface.graph.layers import FakeQuantizer, along_channels
from qface.quantization.exact_scales import ExactScale, ExactWeightScale
from qface.quantization.kernels import quantize_affine, quantize_strided
from qface.quantization.lsq import Bound, lsq_fake_quantize, lsq_fake_quantize_prelu
from qface.quantization.observers import make_observer
from qface.quantization.qparams import QUINT8_MAX, SAFE_WEIGHT, IntegerRange, QParams

__all__ = [
    "NOT_CALIBRATED",
    "ImageFakeQuantize",
    "LSQFakeQuantize",
    "SharedScaleFakeQuantize",
    "WeightFakeQuantize",
    "offset_range",
    "quantizers",
]

NOT_CALIBRATED = (
    "this student is not calibrated: run qface calibrate STUDENT --images FACES -o FILE, or call "
    "qface.calibrate(student, images), first"
)
_MIN_SCALE = 1e-12


class _SwitchedFakeQuantize(FakeQuantizer, FakeQuantizeBase):
    """Base that mirrors torch.ao's switch tensors as bools, to avoid a CUDA sync in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self._mirror()

    def _mirror(self) -> None:
        self.observing = bool(self.observer_enabled.item())
        self.quantizing = bool(self.fake_quant_enabled.item())

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch fake quantization on or off."""
        super().enable_fake_quant(enabled)
        self._mirror()

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch the observer on or off."""
        super().enable_observer(enabled)
        self._mirror()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror()


class LSQFakeQuantize(_SwitchedFakeQuantize):
    """Learned step size quantization (LSQ, Esser et al., ICLR 2020) of a weight or an activation.

    Weights are quantized per channel and symmetrically, activations affinely, with one scale per tensor. ``scale`` is a
    parameter, so that an optimizer can train it; :func:`qface.calibrate` initializes it with the observer.

    An activation [N, C, ...] may have one zero point per channel, so that channels with different means share a scale
    (channel-wise shifting, Wei et al., Outlier Suppression+, EMNLP 2023). Integer kernels have one zero point per
    tensor; the biases around the tensor absorb the rest (:mod:`qface.deployment.zero_points`).

    Args:
        bits: 2 to 8.
        num_channels: number of output channels of a weight; None for an activation.
        observer: name of the observer, see :class:`qface.quantization.QuantizationConfig`.
        percentile: percentage of the values inside the range, for the observer ``"percentile"``.
        num_zero_points: number of zero points of an activation: 1, or its number of channels.
    """

    scale: nn.Parameter
    zero_point: Tensor
    calibrated: Tensor
    center: Tensor | None
    scale_rule: ExactScale | ExactWeightScale | None = None
    """Rule that computes the scale used for rounding from the learned one; None if both are the same."""

    def __init__(
        self,
        bits: int,
        num_channels: int | None = None,
        observer: str = "mse",
        percentile: float = 99.99,
        num_zero_points: int = 1,
    ) -> None:
        super().__init__()
        check_whole(1, num_zero_points=num_zero_points)
        self.bits = bits
        self.num_zero_points = num_zero_points
        self.num_channels = num_channels
        self.observer = observer
        self.percentile = percentile
        self.integer_range = IntegerRange(bits, symmetric=num_channels is not None)
        # Attributes that torch.ao expects of a fake-quant module.
        self.dtype = torch.qint8 if self.integer_range.symmetric else torch.quint8
        self.quant_min, self.quant_max = self.integer_range.quant_min, self.integer_range.quant_max
        self.is_dynamic = False
        self.ch_axis = 0
        self.behind_prelu = False  # True after a PReLU whose input shares this scale
        self.activation_post_process = make_observer(observer, self.integer_range, num_channels is not None, percentile)
        self.scale = nn.Parameter(torch.ones(num_channels or 1))
        self.register_buffer("zero_point", torch.zeros(num_channels or num_zero_points, dtype=torch.int32))
        # Middle of each channel's range, which equalization finds; the zero points of channels differ by it.
        self.register_buffer("center", torch.zeros(num_zero_points) if num_zero_points > 1 else None)
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.uint8))
        self.disable_observer()

    def _mirror(self) -> None:
        super()._mirror()
        self._ready = bool(self.calibrated.item()) if "calibrated" in self._buffers else False
        self._only_zero = int(self.zero_point[0].item()) if "zero_point" in self._buffers else 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        low, high = (0, 0) if self.integer_range.symmetric else (self.quant_min, self.quant_max)
        if self.calibrated.item() and not bool(((self.zero_point >= low) & (self.zero_point <= high)).all()):
            args[-1].append(f"{prefix}zero_point is outside {low} to {high}")

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``.

        Raises:
            ConfigError: the scale was never set.
        """
        if self.observing:
            self.observe(x)
        if not self.quantizing or self.rounds_within_prelu:
            return x
        if not self._ready:
            raise ConfigError(NOT_CALIBRATED)
        if not self.training:
            return self.rounded(x)
        return self.fake_quantize(x, *self.bounds)

    def fake_quantize(self, x: Tensor, low: Bound, high: Bound) -> Tensor:
        """Fake-quantize ``x`` with this scale and integers, minus the zero point, of ``low`` to ``high``."""
        return lsq_fake_quantize(x, self._learned_scale().view(self._shape(x)), low, high, self._grad_factor(x))

    @property
    def rounds_within_prelu(self) -> bool:
        """True if the PReLU before this quantizer already rounds its input and output in one fused pass."""
        return self.behind_prelu and self.training and self.quantizing and self._ready and not self.observing

    def prelu(self, x: Tensor, slopes: Tensor) -> Tensor:
        """Apply PReLU to ``x`` [N, C, ...]; round its input to uint8 and its output to this integer range."""
        return lsq_fake_quantize_prelu(x, slopes, self._learned_scale(), -self.zero, *self.bounds, self._grad_factor(x))

    def keep_positive(self) -> None:
        """Raise a scale that a step of an optimizer left at or below 0."""
        # In place on ``data``, since a quantizer that shares the scale may already have saved it for its backward.
        self.scale.data.clamp_(min=_MIN_SCALE)

    def _learned_scale(self) -> Tensor:
        self.keep_positive()
        if self.scale_rule is None:
            return self.scale
        return self.scale + (self.exact_scale() - self.scale).detach()

    def exact_scale(self) -> Tensor:
        """Return the scale used for rounding, [C] or [1], without gradient."""
        return self.scale.detach() if self.scale_rule is None else self.scale_rule()

    @property
    def zero(self) -> Bound:
        """The only zero point, or those of the channels, [C]."""
        return self._only_zero if self.num_zero_points == 1 else self.zero_point

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """Minimum and maximum integer minus the zero point; [C] where each channel has its own."""
        return self.quant_min - self.zero, self.quant_max - self.zero

    def _grad_factor(self, x: Tensor) -> float:
        """Return LSQ's gradient scale: 1 / sqrt(values per image that share the scale x number of steps)."""
        return float((x[0].numel() * self.integer_range.num_steps) ** -0.5)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape in which the scale broadcasts against ``x``."""
        return (1,) if self.num_channels is None else (-1,) + (1,) * (x.ndim - 1)

    def observe(self, x: Tensor) -> None:
        """Pass ``x`` to the observer; for a weight, only the last tensor counts.

        Of an activation with zero points per channel, it sees each channel around its center.
        """
        if self.num_channels is not None:
            self.activation_post_process.reset()
        self.activation_post_process(x if self.center is None else x - along_channels(self.center, x))
        if self.quantizing:  # during training, update the range at once
            self.set_range()

    def set_range(self) -> None:
        """Set scale and zero point from the observer.

        Raises:
            ConfigError: the observer has seen no tensor.
        """
        scale, zero_point = self.calculate_qparams()
        if self.center is not None:
            moved = zero_point - (self.center / scale).round()
            zero_point = moved.clamp(self.quant_min, self.quant_max)  # zero stays exact, as padding needs it
        self.set_qparams(scale, zero_point)

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, each [C] or [1]."""
        self.scale.data.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated[0] = 1
        self._mirror()

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point that the observer chooses."""
        return self.activation_post_process.calculate_qparams()

    def qparams(self) -> QParams:
        """Return the quantization parameters, without gradient."""
        return QParams(self.exact_scale(), self.zero_point, self.quant_min, self.quant_max)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Quantize ``x``; return the integers as floats of the same shape."""
        return quantize_affine(x, *self.qparams_along(x))

    @torch.no_grad()
    def rounded(self, x: Tensor) -> Tensor:
        """Return the values that the integers of ``x`` stand for."""
        qparams = self.qparams_along(x)
        return quantize_affine(x, *qparams).sub_(qparams.zero_point).mul_(qparams.scale)

    def qparams_along(self, x: Tensor) -> QParams:
        """Return the quantization parameters in a shape that broadcasts against ``x``."""
        qparams, shape = self.qparams(), self._shape(x)
        zero_point = qparams.zero_point.view(shape) if self.num_zero_points == 1 else along_channels(self.zero_point, x)
        return qparams._replace(scale=qparams.scale.view(shape), zero_point=zero_point)


class WeightFakeQuantize(LSQFakeQuantize):
    """Learned step size quantization of a weight whose channels may have integers of their own.

    A channel has the integers ``stride * q + offset``, with q a signed integer of ``bits`` bits. Files store q and the
    offsets; kernels read the integers, with zero point 0. Offsets other than 0 suit channels whose weights are not
    symmetric about 0, as many of depthwise convolutions, and an odd offset at stride 2 makes the levels symmetric,
    without a level at 0 (mid-rise). :mod:`qface.quantization.weight_qparams` chooses them.

    Args:
        bits: 2 to 8.
        num_channels: number of output channels.
        observer: name of the observer, see :class:`qface.quantization.QuantizationConfig`.
        percentile: percentage of the values inside the range, for the observer ``"percentile"``.
    """

    offset: Tensor
    stride: Tensor

    def __init__(self, bits: int, num_channels: int, observer: str = "mse", percentile: float = 99.99) -> None:
        super().__init__(bits, num_channels, observer, percentile)
        self.register_buffer("offset", torch.zeros(num_channels, dtype=torch.int32))
        self.register_buffer("stride", torch.ones(1, dtype=torch.int32))
        self._mirror()

    def _mirror(self) -> None:
        super()._mirror()
        self._stride = int(self.stride.item()) if "stride" in self._buffers else 1
        self.has_offsets = self._stride > 1 or ("offset" in self._buffers and bool(self.offset.any()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("offset", "stride"):  # files of format 4 have none
            state_dict.setdefault(f"{prefix}{name}", self._buffers[name])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._stride not in (1, 2):
            args[-1].append(f"{prefix}stride is neither 1 nor 2")
            return
        low, high = offset_range(self.bits, self._stride)
        if not bool(((self.offset >= low) & (self.offset <= high)).all()):
            args[-1].append(f"{prefix}offset is outside {low} to {high}")

    def set_range(self) -> None:
        """Set the scales from the observer, which knows no offsets; weights that have some keep their scales."""
        if not self.has_offsets:
            super().set_range()

    def set_weight_qparams(self, scale: Tensor, offset: Tensor, stride: int) -> None:
        """Set scales, float [C], offsets, int [C], and the stride, 1 or 2."""
        self.offset.copy_(offset)
        self.stride.fill_(stride)
        self.set_qparams(scale, self.zero_point)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Quantize ``x`` [C, ...]; return the integers as floats of the same shape."""
        scale, offset = (values.view(self._shape(x)) for values in (self.exact_scale(), self.offset))
        return quantize_strided(x, scale, offset, self._stride, self.quant_min, self.quant_max)

    @torch.no_grad()
    def rounded(self, x: Tensor) -> Tensor:
        """Return the values that the integers of ``x`` stand for."""
        return self.integers(x).mul_(self.exact_scale().view(self._shape(x)))

    def fake_quantize(self, x: Tensor, low: Bound, high: Bound) -> Tensor:
        """Fake-quantize ``x`` with this scale and signed integers of ``low`` to ``high``, strided and offset.

        The gradient of the scale is that of fixed integers, unlike LSQ's, because a trained weight follows its scale
        (:mod:`qface.quantization.latent_weights`). It is divided by the sum of squared integers: a step of gradient
        descent then changes the values as far along the channel's direction as one that moves them freely.
        """
        scale = self._learned_scale().view(self._shape(x))
        fixed = scale.detach()
        shift = fixed * self.offset.view(self._shape(x))
        rounded = lsq_fake_quantize(x - shift, self._stride * fixed, low, high, 1.0) + shift
        squares = (rounded.detach() / fixed).square().flatten(1).sum(1).clamp(min=1).view(self._shape(x))
        return rounded * _with_gradient_times(1 / squares, scale / fixed)


def _with_gradient_times(factor: Tensor, values: Tensor) -> Tensor:
    """Return ``values``, whose gradient is multiplied by ``factor``."""
    return values + (factor - 1) * (values - values.detach())


def offset_range(bits: int, stride: int) -> tuple[int, int]:
    """Return the minimum and maximum offset of weights of ``bits`` bits, with which no integer exceeds its limit."""
    integers = IntegerRange(bits, symmetric=True)
    low, high = -SAFE_WEIGHT - stride * integers.quant_min, SAFE_WEIGHT - stride * integers.quant_max
    return (low, high) if low <= 0 <= high else (0, 0)


def quantizers(model: nn.Module) -> list[LSQFakeQuantize]:
    """Return the fake-quantize modules of ``model`` that have a scale of their own."""
    return [module for module in model.modules() if isinstance(module, LSQFakeQuantize)]


class SharedScaleFakeQuantize(nn.Module):
    """Fake quantization of a PReLU's input to uint8, with the scale and zero point of the PReLU's output.

    With one scale before and after the PReLU, a positive integer passes unchanged and is rounded only once; a negative
    one is multiplied by its slope in integer arithmetic. The module has no range or switches of its own.
    """

    bits = 8

    def __init__(self) -> None:
        super().__init__()
        self._owner: tuple[LSQFakeQuantize, ...] = ()  # in a tuple, so that torch does not register it as a submodule

    def share_scale_of(self, quantizer: LSQFakeQuantize) -> None:
        """Share scale and zero point of ``quantizer``, which quantizes the PReLU's output."""
        self._owner = (quantizer,)
        quantizer.behind_prelu = True

    @property
    def owner(self) -> LSQFakeQuantize:
        """The quantizer whose scale this shares."""
        return self._owner[0]

    @property
    def scale(self) -> nn.Parameter:
        """The learned scale of the owner."""
        return self.owner.scale

    def exact_scale(self) -> Tensor:
        """Return the scale used for rounding, [1], without gradient."""
        return self.owner.exact_scale()

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """Minimum and maximum integer minus the zero point; [C] where each channel has its own."""
        return -self.owner.zero, QUINT8_MAX - self.owner.zero

    @property
    def quantizing(self) -> bool:
        """True if fake quantization is on."""
        return any(quantizer.quantizing for quantizer in self._owner)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``."""
        if not self.quantizing or self.owner.rounds_within_prelu:
            return x
        if self.training:
            return self.owner.fake_quantize(x, *self.bounds)
        qparams = self.owner.qparams_along(x)._replace(quant_min=0, quant_max=QUINT8_MAX)
        return quantize_affine(x, *qparams).sub_(qparams.zero_point).mul_(qparams.scale)

    def qparams(self) -> QParams:
        """Return the quantization parameters, without gradient."""
        return self.owner.qparams()._replace(quant_min=0, quant_max=QUINT8_MAX)


class ImageFakeQuantize(_SwitchedFakeQuantize):
    """Fake quantization of a normalized image to uint8, lossless for every pixel value.

    A pixel x in 0..255 is normalized to ``(x - mean) / std``. With ``scale = 1 / std`` and ``zero_point = round(mean)``
    its integer is x itself, and the network's input becomes ``(x - zero_point) / std``: with InsightFace's mean of
    127.5, every pixel is half a gray level darker. No gray level is lost, zero padding is exact, and the first
    convolution of the exported file takes the bytes of the image as they are.

    Args:
        scale: one gray level, ``1 / std``.
        zero_point: the byte that represents zero, 0 to 255.
        offset: ``(zero_point - mean) / std``, subtracted from the normalized image before rounding.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, scale: float, zero_point: int, offset: float) -> None:
        super().__init__()
        check_whole(0, zero_point=zero_point)
        if not (zero_point <= QUINT8_MAX and 0 < scale < math.inf and math.isfinite(offset)):
            raise ConfigError(
                f"zero_point must be <= {QUINT8_MAX}, scale > 0 and offset finite, got {zero_point}, {scale}, {offset}"
            )
        self.bits = 8
        self.scale = float(scale)
        self.zero_point = zero_point
        self.offset = float(offset)
        self.quant_min, self.quant_max = 0, QUINT8_MAX
        self.dtype = torch.quint8
        self.is_dynamic = False
        self.disable_observer()

    def forward(self, x: Tensor) -> Tensor:
        """Round the image to its uint8 values."""
        if not self.quantizing:
            return x
        # Values are half a gray level away from any rounding tie, so every rounding mode gives the same byte.
        return torch.fake_quantize_per_tensor_affine(x - self.offset, self.scale, self.zero_point, 0, QUINT8_MAX)

    @property
    def range(self) -> tuple[float, float]:
        """Normalized values of the bytes 0 and 255."""
        low, high = (self.scale * (byte - self.zero_point) + self.offset for byte in (0, QUINT8_MAX))
        return low, high

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """Minimum and maximum integer minus the zero point."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    def exact_scale(self) -> Tensor:
        """Return the scale, one gray level, [1]."""
        return torch.tensor([self.scale], device=self.fake_quant_enabled.device)

    def qparams(self) -> QParams:
        """Return the quantization parameters."""
        zero_point = torch.tensor([self.zero_point], device=self.fake_quant_enabled.device)
        return QParams(self.exact_scale(), zero_point, self.quant_min, self.quant_max)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the fixed scale and zero point."""
        return torch.tensor([self.scale]), torch.tensor([self.zero_point], dtype=torch.int32)
