"""Observers, which choose scale and zero point from the tensors that they see.

An observer works on rows: the flattened tensor as one row for an activation, one row per output channel for a weight.
Activations are affine and unsigned, ``scale * (q - zero_point)`` with q in 256 - 2^bits .. 255; weights are symmetric
and signed, ``scale * q`` with q in -2^(bits-1) .. 2^(bits-1) - 1.

Activations use the top of a byte because integer kernels saturate at 255, so that the upper clamp is free. The integers
below the range hold the input of a PReLU (:class:`qface.quantization.fake_quantize.SharedScaleFakeQuantize`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import ObserverBase

from qface.errors import ConfigError
from qface.quantization.kernels import in_memory_order
from qface.quantization.qparams import IntegerRange
from qface.quantization.quantization_config import check_percentile

__all__ = [
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "RangeObserver",
    "make_observer",
]

_AVERAGING = 0.01  # torch.ao's default averaging constant
_SAMPLES = 32_768  # sampled values per activation for percentiles and squared errors
_SAMPLES_PER_CALL = 8_192
_AFFINE_STEPS = 15  # candidates for either end of the range
_SYMMETRIC_FRACTIONS = torch.linspace(0.2, 1.0, 41)  # candidate clipping bounds, relative to a channel's maximum weight


class RangeObserver(ObserverBase):
    """Base class of observers: it flattens tensors to rows for :meth:`observe`.

    Args:
        integer_range: integers to choose scale and zero point for.
        per_channel: True for one row per slice of dimension 0, False for one row per tensor.
    """

    def __init__(self, integer_range: IntegerRange, per_channel: bool) -> None:
        super().__init__(dtype=torch.qint8 if integer_range.symmetric else torch.quint8)
        self.integer_range = integer_range
        self.per_channel = per_channel
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it."""
        values = x.detach().float()
        if self.per_channel:
            self.observe(values.reshape(len(values), -1))
        else:
            self.observe(in_memory_order(values, like=values).reshape(1, -1))
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return scale (float32) and zero point (int32), one per row.

        Raises:
            ConfigError: no tensor was observed.
        """
        if self.empty:
            raise ConfigError("no tensor was observed; pass at least one image to calibrate")
        return self.choose()

    @property
    @abstractmethod
    def empty(self) -> bool:
        """True if no tensor was observed yet."""

    @abstractmethod
    def reset(self) -> None:
        """Discard everything observed so far."""

    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """Return everything observed so far, for :meth:`restore`; empty before the first tensor."""

    @abstractmethod
    def restore(self, statistics: dict[str, Tensor], device: torch.device) -> None:
        """Continue from the ``statistics`` of another observer with the same settings, for tensors on ``device``."""

    @abstractmethod
    def observe(self, rows: Tensor) -> None:
        """Add the values of ``rows``, float32 [num_rows, n]."""

    @abstractmethod
    def choose(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, one per row."""


class MinMaxObserver(RangeObserver):
    """Observer of the minimum and maximum of all values."""

    def reset(self) -> None:
        """Discard everything observed so far."""
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True if no tensor was observed yet."""
        return self.low is None

    def statistics(self) -> dict[str, Tensor]:
        """Return the ends of the range."""
        return {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}

    def restore(self, statistics: dict[str, Tensor], device: torch.device) -> None:
        """Continue from these ends of the range."""
        self.reset()
        if statistics:
            self.low, self.high = statistics["low"].to(device), statistics["high"].to(device)

    def observe(self, rows: Tensor) -> None:
        """Widen the range."""
        low, high = rows.amin(1), rows.amax(1)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = self.merge(self.low, low, self.high, high)

    def merge(self, low: Tensor, new_low: Tensor, high: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the range, updated with those of a new tensor."""
        return torch.minimum(low, new_low), torch.maximum(high, new_high)

    def choose(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for the observed range."""
        assert self.low is not None and self.high is not None
        return self.integer_range.choose_qparams(self.low, self.high)


class MovingAverageObserver(MinMaxObserver):
    """Observer of the moving averages of minimum and maximum, with weight 0.01 for a new tensor."""

    def merge(self, low: Tensor, new_low: Tensor, high: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the range, updated with those of a new tensor."""
        return low.lerp(new_low, _AVERAGING), high.lerp(new_high, _AVERAGING)


class _SamplingObserver(RangeObserver):
    """Base of observers that keep a uniform sample of an activation's values, or the last weight.

    Each value gets a random key, and the smallest keys are kept, so that early and late batches count equally. The keys
    are seeded, so that calibration is reproducible.
    """

    def reset(self) -> None:
        """Discard everything observed so far."""
        self.samples: Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def empty(self) -> bool:
        """True if no tensor was observed yet."""
        return self.samples is None

    def statistics(self) -> dict[str, Tensor]:
        """Return the sample, its keys and the state of the generator."""
        if self.samples is None:
            return {}
        return {"samples": self.samples, "keys": self._keys, "generator": self._generator.get_state()}

    def restore(self, statistics: dict[str, Tensor], device: torch.device) -> None:
        """Continue from this sample."""
        self.reset()
        if statistics:
            self.samples, self._keys = statistics["samples"].to(device), statistics["keys"]
            self._generator.set_state(statistics["generator"])

    def observe(self, rows: Tensor) -> None:
        """Add the values of ``rows`` to the sample."""
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
    """Observer that clips the same fraction of the values at both ends.

    Args:
        integer_range: see :class:`RangeObserver`.
        per_channel: see :class:`RangeObserver`.
        percentile: percentage of the values inside the range.
    """

    def __init__(self, integer_range: IntegerRange, per_channel: bool, percentile: float) -> None:
        super().__init__(integer_range, per_channel)
        self.percentile = percentile

    def choose(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for the range of the percentile."""
        assert self.samples is not None
        tail = (1 - self.percentile / 100) / 2
        return self.integer_range.choose_qparams(
            self.samples.quantile(tail, dim=1), self.samples.quantile(1 - tail, dim=1)
        )


class MSEObserver(_SamplingObserver):
    """Observer that minimizes the mean squared quantization error over the sample.

    It searches both ends of an affine range, first coarse, then fine, and the clipping bound of a symmetric one.
    """

    def choose(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point with the smallest error."""
        assert self.samples is not None
        return self._symmetric(self.samples) if self.integer_range.symmetric else self._affine(self.samples)

    def _symmetric(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.abs().amax(1)
        best_error = torch.full_like(largest, torch.inf)
        best_bound = largest.clone()
        for fraction in _SYMMETRIC_FRACTIONS.tolist():
            error = self.integer_range.squared_errors(rows, -fraction * largest, fraction * largest)
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
        """Return the pair of ends with the smallest squared error."""
        errors = torch.stack([self.integer_range.squared_errors(values, low.expand_as(highs), highs) for low in lows])
        row, column = divmod(int(errors.argmin()), len(highs))
        return lows[row], highs[column]


def make_observer(observer: str, integer_range: IntegerRange, per_channel: bool, percentile: float) -> RangeObserver:
    """Build an observer by name.

    Args:
        observer: one of the names in :class:`qface.quantization.QuantizationConfig`.
        integer_range: integers to choose scale and zero point for.
        per_channel: True for weights, False for activations.
        percentile: percentage of the values inside the range, for ``"percentile"``.

    Raises:
        ConfigError: ``percentile`` is out of range.
    """
    check_percentile(percentile)
    if observer == "percentile":
        return PercentileObserver(integer_range, per_channel, percentile)
    kinds: dict[str, type[RangeObserver]] = {
        "mse": MSEObserver,
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
    }
    return kinds[observer](integer_range, per_channel)
