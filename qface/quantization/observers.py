"""Observers: they see tensors and choose scale and zero point.

Every observer works on rows: one row for a whole activation tensor, one row per output channel for a weight. The
integers of ``bits`` bits are affine and unsigned for activations, ``scale * (q - zero_point)`` with q in 256 - 2^bits
.. 255, and symmetric and signed for weights, ``scale * q`` with q in -2^(bits-1) .. 2^(bits-1) - 1.

Activations take the top of a byte because integer kernels saturate there: the upper clamp costs nothing, and below the
least integer there is room for what a PReLU reads (:class:`qface.quantization.fake_quantize.SharedScaleFakeQuantize`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import ObserverBase

from qface.errors import ConfigError
from qface.quantization.qparams import IntegerRange

__all__ = [
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "RangeObserver",
    "make_observer",
]

_AVERAGING = 0.01  # torch.ao's default for moving averages of ranges
_SAMPLES = 32_768  # values of an activation that a percentile or squared error is computed from
_SAMPLES_PER_CALL = 8_192
_AFFINE_STEPS = 15  # candidates for each end of the range
_SYMMETRIC_FRACTIONS = torch.linspace(0.2, 1.0, 41)  # candidates for a channel's scale, of its largest weight


class RangeObserver(ObserverBase):
    """Base: turns tensors into rows, hands them to :meth:`observe`, and asks :meth:`calculate_qparams` for the result.

    Args:
        integer_range: the integers to choose a scale for.
        per_channel: rows are the slices of dimension 0, or else the tensor is one row.
    """

    def __init__(self, integer_range: IntegerRange, per_channel: bool) -> None:
        super().__init__(dtype=torch.qint8 if integer_range.symmetric else torch.quint8)
        self.integer_range = integer_range
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
        return self.integer_range.choose_qparams(self.low, self.high)


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
        integer_range: see :class:`RangeObserver`.
        per_channel: see :class:`RangeObserver`.
        percentile: share of the values inside the range, in percent.
    """

    def __init__(self, integer_range: IntegerRange, per_channel: bool, percentile: float) -> None:
        super().__init__(integer_range, per_channel)
        self.percentile = percentile

    def choose(self) -> tuple[Tensor, Tensor]:
        """Cover the percentile."""
        assert self.samples is not None
        tail = (1 - self.percentile / 100) / 2
        return self.integer_range.choose_qparams(
            self.samples.quantile(tail, dim=1), self.samples.quantile(1 - tail, dim=1)
        )


class MSEObserver(_SamplingObserver):
    """The range with the least mean squared rounding and clipping error over the sample.

    A search: for affine ranges over both ends of the range, coarse and then fine; for symmetric ranges over the scale.
    """

    def choose(self) -> tuple[Tensor, Tensor]:
        """Search the range."""
        assert self.samples is not None
        return self._symmetric(self.samples) if self.integer_range.symmetric else self._affine(self.samples)

    def _symmetric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(1)
        best_error = torch.full_like(largest, torch.inf)
        best_bound = largest.clone()
        for fraction in _SYMMETRIC_FRACTIONS.tolist():
            scale, zero_point = self.integer_range.choose_qparams(-fraction * largest, fraction * largest)
            error = (
                (self.integer_range.fake_quantize(rows, scale[:, None], zero_point[:, None]) - rows).square().mean(1)
            )
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_bound = torch.where(better, fraction * largest, best_bound)
        return self.integer_range.choose_qparams(-best_bound, best_bound)

    def _affine(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values = rows[0]
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        steps = torch.linspace(1 / _AFFINE_STEPS, 1, _AFFINE_STEPS, device=values.device)
        low, high = self._best(values, low * steps, high * steps)
        around = 1 + torch.linspace(-1, 1, _AFFINE_STEPS, device=values.device) / _AFFINE_STEPS
        low, high = self._best(values, low * around, high * around)
        scale, zero_point = self.integer_range.choose_qparams(low, high)
        return scale.reshape(1), zero_point.reshape(1)

    def _best(self, values: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of ends with the least squared error."""
        errors = torch.stack([self._errors(values, low.expand_as(highs), highs) for low in lows])
        row, column = divmod(int(errors.argmin()), len(highs))
        return lows[row], highs[column]

    def _errors(self, values: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = self.integer_range.choose_qparams(lows, highs)
        return (self.integer_range.fake_quantize(values, scale[:, None], zero_point[:, None]) - values).square().mean(1)


def make_observer(observer: str, integer_range: IntegerRange, per_channel: bool, percentile: float) -> RangeObserver:
    """The observer that :class:`qface.quantization.QuantizationConfig` calls ``observer``."""
    if observer == "percentile":
        return PercentileObserver(integer_range, per_channel, percentile)
    kinds: dict[str, type[RangeObserver]] = {
        "mse": MSEObserver,
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
    }
    return kinds[observer](integer_range, per_channel)
