"""Observers: they see tensors and choose the scale and zero point of a low-bit grid.

Every observer works on rows: one row for a whole activation tensor, one row per output channel for a weight. The grid
of ``bits`` bits is affine and unsigned for activations, ``scale * (q - zero_point)`` with q in 256 - 2^bits .. 255, and
symmetric and signed for weights, ``scale * q`` with q in -2^(bits-1) .. 2^(bits-1) - 1.

Activations take the top of a byte because integer kernels saturate there: the upper clamp costs nothing, and below the
least level there is room for what a PReLU reads (:class:`qface.quantization.fake_quantize.PreActivationQuantize`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import ObserverBase

from qface.errors import ConfigError

__all__ = [
    "Grid",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "RangeObserver",
    "make_observer",
]

BYTE = 256
"""Levels of the byte that holds an activation."""
_AVERAGING = 0.01  # torch.ao's default for moving averages of ranges
_SAMPLES = 32_768  # values of an activation that a percentile or squared error is computed from
_SAMPLES_PER_CALL = 8_192
_AFFINE_STEPS = 15  # candidates for each end of the range
_SYMMETRIC_FRACTIONS = torch.linspace(0.2, 1.0, 41)  # candidates for a channel's scale, of its largest weight


@dataclass(frozen=True)
class Grid:
    """The integers of a quantized tensor.

    Args:
        bits: width, 2 to 8.
        symmetric: signed with zero point 0 (weights), or unsigned with a zero point (activations).
    """

    bits: int
    symmetric: bool

    @property
    def low(self) -> int:
        """Least integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else BYTE - (1 << self.bits)

    @property
    def high(self) -> int:
        """Greatest integer."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else BYTE - 1

    @property
    def steps(self) -> int:
        """Steps from zero to the greatest weight, or from the least to the greatest activation."""
        return self.high if self.symmetric else self.high - self.low

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (float32 and int32, like ``low``) that cover ``low`` .. ``high`` and hold zero exactly.

        A range of nothing but zeros gets the scale 1.
        """
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.steps
        else:
            scale = (high - low) / self.steps
        # float32 has no smaller normal number, and a division by zero would spread NaN.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        if self.symmetric:
            return scale.float(), torch.zeros_like(scale).int()
        zero_point = self.low + (-low / scale).round().clamp(0, self.steps)
        return scale.float(), zero_point.int()

    def round_trip(self, rows: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``rows`` quantized and back; the qparams broadcast against it."""
        levels = (rows / scale).round_().add_(zero_point).clamp_(self.low, self.high)
        return levels.sub_(zero_point).mul_(scale)


class RangeObserver(ObserverBase):
    """Base: turns tensors into rows, hands them to :meth:`observe`, and asks :meth:`calculate_qparams` for the result.

    Args:
        grid: the integers to choose a scale for.
        per_channel: rows are the slices of dimension 0, or else the tensor is one row.
    """

    def __init__(self, grid: Grid, per_channel: bool) -> None:
        super().__init__(dtype=torch.qint8 if grid.symmetric else torch.quint8)
        self.grid = grid
        self.per_channel = per_channel
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it."""
        values = x.detach().float()
        self.observe(values.reshape(len(values) if self.per_channel else 1, -1))
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), one per row.

        Raises:
            ConfigError: nothing was observed.
        """
        if self.empty:
            raise ConfigError("no tensor was observed; pass at least one image to calibrate")
        return self.choose()

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Nothing was observed yet."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def observe(self, rows: Tensor) -> None:
        """Take in float32 [rows, n]."""

    @abstractmethod
    def choose(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point from what was observed."""


class MinMaxObserver(RangeObserver):
    """The range from the least to the greatest value ever seen."""

    def reset(self) -> None:
        """Forget everything."""
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Nothing was observed yet."""
        return self.low is None

    def observe(self, rows: Tensor) -> None:
        """Widen the range."""
        low, high = rows.amin(1), rows.amax(1)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = self.merge(self.low, low, self.high, high)

    def merge(self, low: Tensor, new_low: Tensor, high: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        """The range after another tensor that reaches from ``new_low`` to ``new_high``."""
        return torch.minimum(low, new_low), torch.maximum(high, new_high)

    def choose(self) -> tuple[Tensor, Tensor]:
        """Cover the range."""
        assert self.low is not None and self.high is not None
        return self.grid.qparams(self.low, self.high)


class MovingAverageObserver(MinMaxObserver):
    """The moving average, with weight 0.01 on the new value, of each tensor's least and greatest value."""

    def merge(self, low: Tensor, new_low: Tensor, high: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        """The range after another tensor that reaches from ``new_low`` to ``new_high``."""
        return low.lerp(new_low, _AVERAGING), high.lerp(new_high, _AVERAGING)


class _SamplingObserver(RangeObserver):
    """Keeps a uniform sample of the values of an activation, and of a weight all values of the last tensor.

    Each value draws a random key and the least keys stay, so that early and late batches count alike; the keys are
    seeded, so that calibration repeats.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.samples: Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def empty(self) -> bool:
        """Nothing was observed yet."""
        return self.samples is None

    def observe(self, rows: Tensor) -> None:
        """Add values to the sample."""
        if self.per_channel:
            self.samples = rows
            return
        values = rows[0]
        if len(values) > _SAMPLES_PER_CALL:
            chosen = torch.randint(len(values), (_SAMPLES_PER_CALL,), generator=self._generator)
            values = values[chosen.to(values.device)]
        keys = torch.rand(len(values), generator=self._generator)
        if self.samples is not None:
            values, keys = torch.cat([self.samples[0], values]), torch.cat([self._keys, keys])
        kept = keys.argsort()[:_SAMPLES]
        self.samples, self._keys = values[kept.to(values.device)].unsqueeze(0), keys[kept]


class PercentileObserver(_SamplingObserver):
    """The range that leaves out the same small share of the values at both ends.

    Args:
        grid: see :class:`RangeObserver`.
        per_channel: see :class:`RangeObserver`.
        percentile: share of the values inside the range, in percent.
    """

    def __init__(self, grid: Grid, per_channel: bool, percentile: float) -> None:
        super().__init__(grid, per_channel)
        self.percentile = percentile

    def choose(self) -> tuple[Tensor, Tensor]:
        """Cover the percentile."""
        assert self.samples is not None
        tail = (1 - self.percentile / 100) / 2
        return self.grid.qparams(self.samples.quantile(tail, dim=1), self.samples.quantile(1 - tail, dim=1))


class MSEObserver(_SamplingObserver):
    """The range with the least mean squared rounding and clipping error over the sample.

    A search: for affine grids over both ends of the range, coarse and then fine; for symmetric grids over the scale.
    """

    def choose(self) -> tuple[Tensor, Tensor]:
        """Search the range."""
        assert self.samples is not None
        return self._symmetric(self.samples) if self.grid.symmetric else self._affine(self.samples)

    def _symmetric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(1)
        best_error = torch.full_like(largest, torch.inf)
        best_bound = largest.clone()
        for fraction in _SYMMETRIC_FRACTIONS.tolist():
            scale, zero_point = self.grid.qparams(-fraction * largest, fraction * largest)
            error = (self.grid.round_trip(rows, scale[:, None], zero_point[:, None]) - rows).square().mean(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_bound = torch.where(better, fraction * largest, best_bound)
        return self.grid.qparams(-best_bound, best_bound)

    def _affine(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values = rows[0]
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        steps = torch.linspace(1 / _AFFINE_STEPS, 1, _AFFINE_STEPS, device=values.device)
        low, high = self._best(values, low * steps, high * steps)
        around = 1 + torch.linspace(-1, 1, _AFFINE_STEPS, device=values.device) / _AFFINE_STEPS
        low, high = self._best(values, low * around, high * around)
        scale, zero_point = self.grid.qparams(low, high)
        return scale.reshape(1), zero_point.reshape(1)

    def _best(self, values: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of ends with the least squared error."""
        errors = torch.stack([self._errors(values, low.expand_as(highs), highs) for low in lows])
        row, column = divmod(int(errors.argmin()), len(highs))
        return lows[row], highs[column]

    def _errors(self, values: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = self.grid.qparams(lows, highs)
        return (self.grid.round_trip(values, scale[:, None], zero_point[:, None]) - values).square().mean(1)


def make_observer(rule: str, grid: Grid, per_channel: bool, percentile: float) -> RangeObserver:
    """The observer for a range rule of :class:`qface.quantization.QuantizationConfig`."""
    if rule == "percentile":
        return PercentileObserver(grid, per_channel, percentile)
    kinds: dict[str, type[RangeObserver]] = {
        "mse": MSEObserver,
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
    }
    return kinds[rule](grid, per_channel)
