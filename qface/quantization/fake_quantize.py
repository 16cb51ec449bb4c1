"""Fake-quant modules: they round a float tensor to a low-bit grid, with gradients for the tensor and for the scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase

from qface.errors import ConfigError
from qface.quantization.kernels import GridTensors, on_grid
from qface.quantization.learned_step import Levels, prelu_on_grid, round_to_grid
from qface.quantization.observers import BYTE, Grid, make_observer

__all__ = ["ImageQuantize", "LowBitFakeQuantize", "PreActivationQuantize"]

_MIN_SCALE = 1e-12


class _SwitchedFakeQuantize(FakeQuantizeBase):
    """Mirrors torch.ao's two switches, which are tensors, in Python: a forward on CUDA need not wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._mirror()

    def _mirror(self) -> None:
        self.observing = bool(self.observer_enabled.item())
        self.quantizing = bool(self.fake_quant_enabled.item())

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch rounding on or off."""
        super().enable_fake_quant(enabled)
        self._mirror()

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch observation on or off."""
        super().enable_observer(enabled)
        self._mirror()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror()


class LowBitFakeQuantize(_SwitchedFakeQuantize):
    """Rounds to ``bits`` bits: per tensor and affine for activations, per channel and symmetric for weights.

    Its ``scale`` is a parameter, so that an optimizer can learn it (LSQ, Esser et al., ICLR 2020); it starts where
    ``rule`` puts it in :func:`qface.calibrate`.

    Args:
        bits: width, 2 to 8.
        channels: number of output channels of a weight; None for an activation.
        rule: how the range is chosen, see :class:`qface.quantization.QuantizationConfig`.
        percentile: for the rule ``"percentile"``.
    """

    scale: nn.Parameter
    zero_point: Tensor
    calibrated: Tensor

    def __init__(self, bits: int, channels: int | None = None, rule: str = "mse", percentile: float = 99.99) -> None:
        super().__init__()
        self.bits = bits
        self.channels = channels
        self.rule = rule
        self.percentile = percentile
        self.grid = Grid(bits, symmetric=channels is not None)
        # What torch.ao asks of a fake-quant module.
        self.dtype = torch.qint8 if self.grid.symmetric else torch.quint8
        self.quant_min, self.quant_max = self.grid.low, self.grid.high
        self.is_dynamic = False
        self.ch_axis = 0
        self.behind_prelu = False  # one that reads values of the same step
        self.activation_post_process = make_observer(rule, self.grid, channels is not None, percentile)
        self.scale = nn.Parameter(torch.ones(channels or 1))
        self.register_buffer("zero_point", torch.zeros(channels or 1, dtype=torch.int32))
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.uint8))
        self.disable_observer()

    def _mirror(self) -> None:
        super()._mirror()
        self._ready = bool(self.calibrated.item()) if "calibrated" in self._buffers else False
        self._zero = int(self.zero_point[0].item()) if "zero_point" in self._buffers else 0

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its own shape.

        Raises:
            ConfigError: the scale was never set.
        """
        if self.observing:
            self.observe(x)
        if not self.quantizing or self.rounds_within_prelu:
            return x
        if not self._ready:
            raise ConfigError(
                "this network is quantized but not calibrated; call qface.calibrate(student, images) first"
            )
        if not self.training:
            return self._deployed(x)
        return self.fake_quantize(x, self.grid.low, self.grid.high)

    def fake_quantize(self, x: Tensor, low: int, high: int) -> Tensor:
        """``x`` rounded to this step, clamped to the integers ``low`` .. ``high``; differentiable."""
        step = self._learned_scale().view(self._shape(x))
        return round_to_grid(x, step, self._levels(low, high), self._factor(x))

    @property
    def rounds_within_prelu(self) -> bool:
        """Whether the PReLU before it rounds what it reads and makes at once, so that nothing is left to round."""
        return self.behind_prelu and self.training and self.quantizing and self._ready and not self.observing

    def prelu(self, x: Tensor, slopes: Tensor) -> Tensor:
        """The PReLU of ``x`` [N, C, ...], rounded before it to all integers of a byte, and behind it to this grid."""
        levels = self._levels(self.grid.low, self.grid.high)
        return prelu_on_grid(x, slopes, self._learned_scale(), self._levels(0, BYTE - 1), levels, self._factor(x))

    def _learned_scale(self) -> Tensor:
        # Through ``data``, since whoever shares the scale may have used it for its own gradient already.
        self.scale.data.clamp_(min=_MIN_SCALE)
        return self.scale

    def _levels(self, low: int, high: int) -> Levels:
        return Levels(low - self._zero, high - self._zero)

    def _factor(self, x: Tensor) -> float:
        """LSQ's: one over the root of (values that share the scale, in one image) x (greatest integer)."""
        return float((x[0].numel() * self.grid.steps) ** -0.5)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """In which scale and zero point broadcast against ``x``."""
        return (1,) if self.channels is None else (-1,) + (1,) * (x.ndim - 1)

    def observe(self, x: Tensor) -> None:
        """Let the observer see ``x``; of a weight only the last tensor counts."""
        if self.channels is not None:
            self.activation_post_process.reset()
        self.activation_post_process(x)
        if self.quantizing:  # during training the range follows at once
            self.set_range()

    def set_range(self) -> None:
        """Take scale and zero point from the observer.

        Raises:
            ConfigError: it has seen nothing.
        """
        scale, zero_point = self.calculate_qparams()
        self.set_qparams(scale, zero_point)

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, each of as many values as there are channels."""
        self.scale.data.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated[0] = 1
        self._mirror()

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the observer chooses."""
        return self.activation_post_process.calculate_qparams()

    def tensors(self) -> GridTensors:
        """Scale and zero point, without gradient."""
        return GridTensors(self.scale.detach(), self.zero_point)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """The integers that stand for ``x``, as floats of its shape."""
        shape = self._shape(x)
        return on_grid(x, self.scale.view(shape), self.zero_point.view(shape), self.grid.low, self.grid.high)

    def _deployed(self, x: Tensor) -> Tensor:
        shape = self._shape(x)
        return self.integers(x).sub_(self.zero_point.view(shape)).mul_(self.scale.detach().view(shape))


class PreActivationQuantize(nn.Module):
    """The 8-bit grid of what a PReLU reads: step and zero point of what it makes, over all 256 integers of a byte.

    A positive value then passes the PReLU as the integer that it is, rounded once, and a negative one is multiplied by
    its slope in integers. It has no range of its own, and is on while the one that it follows is.
    """

    bits = 8

    def __init__(self) -> None:
        super().__init__()
        self._followed: tuple[LowBitFakeQuantize, ...] = ()  # in a tuple, so that it is no submodule

    def follow(self, quantizer: LowBitFakeQuantize) -> None:
        """Take step and zero point from ``quantizer``, which rounds what the PReLU makes."""
        self._followed = (quantizer,)
        quantizer.behind_prelu = True

    @property
    def quantizing(self) -> bool:
        """Whether it rounds."""
        return any(quantizer.quantizing for quantizer in self._followed)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, in its own shape."""
        if not self.quantizing or self._followed[0].rounds_within_prelu:
            return x
        if self.training:
            return self._followed[0].fake_quantize(x, 0, BYTE - 1)
        scale, zero_point = self.tensors()
        return on_grid(x, scale, zero_point, 0, BYTE - 1).sub_(zero_point).mul_(scale)

    def tensors(self) -> GridTensors:
        """Scale and zero point, without gradient."""
        return self._followed[0].tensors()


class ImageQuantize(_SwitchedFakeQuantize):
    """The 8-bit grid of a normalised image that holds every byte value exactly.

    Bytes x reach the network as ``(x - mean) / std``. With ``scale = 1 / std`` and ``zero_point = round(mean)``, the
    integer of a pixel is its byte, and what the network reads is ``(x - zero_point) / std``: with InsightFace's mean of
    127.5 half a grey level darker than before, the same for every pixel. So no grey level is lost, zero padding is
    exact, and the first convolution may read the bytes of the image as they are.

    Args:
        scale: one grey level, ``1 / std``.
        zero_point: the byte that reads as zero, 0 to 255.
        offset: what is subtracted from the normalised image before rounding, ``(zero_point - mean) / std``.
    """

    def __init__(self, scale: float, zero_point: int, offset: float) -> None:
        super().__init__()
        self.bits = 8
        self.scale = scale
        self.zero_point = zero_point
        self.offset = offset
        self.grid = Grid(8, symmetric=False)
        self.dtype = torch.quint8
        self.is_dynamic = False
        self.disable_observer()

    def forward(self, x: Tensor) -> Tensor:
        """The image on its grid of bytes."""
        if not self.quantizing:
            return x
        # Half a grey level away from the next tie, so that any way of rounding gives the same byte.
        return torch.fake_quantize_per_tensor_affine(x - self.offset, self.scale, self.zero_point, 0, BYTE - 1)

    @property
    def range(self) -> tuple[float, float]:
        """What the bytes 0 and 255 are normalised to."""
        low, high = (self.scale * (byte - self.zero_point) + self.offset for byte in (0, BYTE - 1))
        return low, high

    def tensors(self) -> GridTensors:
        """Scale and zero point."""
        device = self.fake_quant_enabled.device
        return GridTensors(torch.tensor([self.scale], device=device), torch.tensor([self.zero_point], device=device))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Its fixed scale and zero point."""
        return torch.tensor([self.scale]), torch.tensor([self.zero_point], dtype=torch.int32)
