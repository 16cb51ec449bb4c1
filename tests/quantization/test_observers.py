"""Ranges against plain numpy, for every number of bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from qface.errors import ConfigError
from qface.quantization import (
    IntegerRange,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    RangeObserver,
)

VALUES = st.floats(-1e4, 1e4, width=32)
SQUARABLE = st.integers(-25_600, 25_600).map(lambda n: n / 256)  # whose squares float32 holds
RANGES = st.builds(IntegerRange, st.integers(2, 8), st.booleans())


def tensors(dimensions: int = 2, values: st.SearchStrategy[float] = VALUES) -> st.SearchStrategy[np.ndarray]:
    shapes = arrays.array_shapes(min_dims=dimensions, max_dims=dimensions, max_side=12)
    constant = st.builds(lambda shape, value: np.full(shape, value, np.float32), shapes, values | st.just(0.0))
    return arrays.arrays(np.float32, shapes, elements=values) | constant


def expected_qparams(integer_range: IntegerRange, low: float, high: float) -> tuple[float, int]:
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    steps = 2 ** (integer_range.bits - 1) - 1 if integer_range.symmetric else 2**integer_range.bits - 1
    scale = (max(-low, high) if integer_range.symmetric else high - low) / steps
    least = 0 if integer_range.symmetric else 256 - 2**integer_range.bits
    if scale <= np.finfo(np.float32).tiny:
        return 1.0, least
    return scale, 0 if integer_range.symmetric else least + int(np.clip(np.round(-low / scale), 0, steps))


def fake_quantize(integer_range: IntegerRange, values: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    low, high = (
        (-(2 ** (integer_range.bits - 1)), 2 ** (integer_range.bits - 1) - 1)
        if integer_range.symmetric
        else (256 - 2**integer_range.bits, 255)
    )
    integers = np.clip(np.round(values.astype(np.float64) / scale) + zero_point, low, high)
    return (integers - zero_point) * scale


def check(observer: RangeObserver, rows: list[tuple[float, float]]) -> None:
    """The observer covers each row's low and high as numpy says."""
    scale, zero_point = observer.calculate_qparams()
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    expected = [expected_qparams(observer.integer_range, low, high) for low, high in rows]
    np.testing.assert_allclose(scale.numpy(), [s for s, _ in expected], rtol=1e-6)
    np.testing.assert_array_equal(zero_point.numpy(), [z for _, z in expected])


@given(st.integers(2, 8))
def test_integers_of_every_bit_width(bits: int) -> None:
    affine, symmetric = IntegerRange(bits, symmetric=False), IntegerRange(bits, symmetric=True)
    assert (affine.quant_min, affine.quant_max) == (256 - 2**bits, 255)
    assert (affine.num_steps, symmetric.num_steps) == (2**bits - 1, symmetric.quant_max)
    assert (symmetric.quant_min, symmetric.quant_max) == (-(2**bits) // 2, 2**bits // 2 - 1)


@given(RANGES, VALUES, VALUES)
def test_zero_is_exact_and_both_ends_are_within_half_a_step(
    integer_range: IntegerRange, first: float, second: float
) -> None:
    ends = torch.tensor([min(first, second), max(first, second)])
    scale, zero_point = integer_range.choose_qparams(ends[0], ends[1])
    assert scale > 0 and integer_range.quant_min <= zero_point <= integer_range.quant_max
    assert integer_range.fake_quantize(torch.zeros(1), scale, zero_point) == 0
    if scale != 1 or ends.abs().max() > 1:
        assert (integer_range.fake_quantize(ends, scale, zero_point) - ends).abs().max() <= scale * 0.501


@given(RANGES, st.data())
def test_minmax(integer_range: IntegerRange, data: st.DataObject) -> None:
    batches = data.draw(st.lists(tensors(), min_size=1, max_size=3))
    observer = MinMaxObserver(integer_range, per_channel=False)
    for batch in batches:
        assert observer(torch.from_numpy(batch)) is not None
    check(observer, [(min(b.min() for b in batches), max(b.max() for b in batches))])


@given(RANGES, tensors(3))
def test_minmax_per_channel(integer_range: IntegerRange, weight: np.ndarray) -> None:
    observer = MinMaxObserver(integer_range, per_channel=True)
    observer(torch.from_numpy(weight))
    check(observer, [(channel.min(), channel.max()) for channel in weight])


@pytest.mark.parametrize("bits", range(2, 9))
def test_moving_average(bits: int) -> None:
    batches = np.random.default_rng(bits).normal(size=(5, 40)).astype(np.float32)
    observer = MovingAverageObserver(IntegerRange(bits, symmetric=False), per_channel=False)
    low, high = batches[0].min(), batches[0].max()
    observer(torch.from_numpy(batches[0]))
    for batch in batches[1:]:
        observer(torch.from_numpy(batch))
        low, high = low + 0.01 * (batch.min() - low), high + 0.01 * (batch.max() - high)
    check(observer, [(low, high)])


@given(RANGES, tensors(), st.floats(51, 100))
def test_percentile(integer_range: IntegerRange, weight: np.ndarray, percentile: float) -> None:
    tail = (1 - percentile / 100) / 2
    observer = PercentileObserver(integer_range, True, percentile)
    observer(torch.from_numpy(weight))
    scale, zero_point = observer.calculate_qparams()
    for row, one_scale, one_zero in zip(weight.astype(np.float64), scale.tolist(), zero_point.tolist(), strict=True):
        wanted, zero = expected_qparams(integer_range, np.quantile(row, tail), np.quantile(row, 1 - tail))
        spread = np.abs(row).max() * 1e-5  # quantiles are interpolated in single precision
        assert abs(one_scale - wanted) <= spread or wanted == 1 or one_scale == 1
        assert abs(one_zero - zero) <= 1 or wanted <= spread


def squared_error(integer_range: IntegerRange, values: np.ndarray, qparams: tuple[Tensor, Tensor]) -> float:
    scale, zero_point = (float(v) for v in qparams)
    return float(np.square(fake_quantize(integer_range, values, scale, int(zero_point)) - values).mean())


@given(RANGES, tensors(values=SQUARABLE))
def test_mse_rounds_no_worse_than_minmax(integer_range: IntegerRange, batch: np.ndarray) -> None:
    values = batch.reshape(1, -1)
    both = MSEObserver(integer_range, integer_range.symmetric), MinMaxObserver(integer_range, integer_range.symmetric)
    for observer in both:
        observer(torch.from_numpy(values))
    best, widest = (squared_error(integer_range, values, observer.calculate_qparams()) for observer in both)
    noise = 1e-10 * float(np.square(values.astype(np.float64)).max())  # of searching in single precision
    assert best <= widest * (1 + 1e-4) + noise


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_finds_nearly_the_best_range_of_a_bell_curve(bits: int, symmetric: bool) -> None:
    integer_range = IntegerRange(bits, symmetric)
    values = np.random.default_rng(bits).normal(size=4000).astype(np.float32)
    observer = MSEObserver(integer_range, symmetric)
    observer(torch.from_numpy(values[None]))
    ends = np.abs(values).max() * np.linspace(0.1, 1, 91)
    candidates = [
        np.square(fake_quantize(integer_range, values, *expected_qparams(integer_range, -end, end)) - values).mean()
        for end in ends
    ]
    assert squared_error(integer_range, values, observer.calculate_qparams()) <= 1.1 * min(candidates)


@pytest.mark.parametrize("kind", ["mse", "percentile"])
def test_a_large_activation_is_sampled_and_the_sample_repeats(kind: str) -> None:
    def observe() -> tuple[Tensor, Tensor]:
        integer_range = IntegerRange(6, symmetric=False)
        observer = (
            MSEObserver(integer_range, False) if kind == "mse" else PercentileObserver(integer_range, False, 99.0)
        )
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(torch.seed())  # the global generator has no part in it
        for scale in (1.0, 1.0, 1.0, 10.0, 10.0, 10.0):
            observer(scale * torch.randn(20, 1000, generator=generator))
        return observer.calculate_qparams()

    (scale, zero_point), again = observe(), observe()
    assert torch.equal(scale, again[0]) and torch.equal(zero_point, again[1])
    reach = float(scale) * 63
    assert 15 < reach < 100  # the later, wider batches count as much as the early ones
    assert 20 < int(zero_point) - 192 < 44


@pytest.mark.parametrize("per_channel", [True, False])
def test_nothing_observed_is_an_error_and_reset_forgets(per_channel: bool) -> None:
    integer_range = IntegerRange(6, symmetric=per_channel)
    for observer in (
        MinMaxObserver(integer_range, per_channel),
        MovingAverageObserver(integer_range, per_channel),
        PercentileObserver(integer_range, per_channel, 99.9),
        MSEObserver(integer_range, per_channel),
    ):
        with pytest.raises(ConfigError):
            observer.calculate_qparams()
        observer(torch.full((2, 5), 100.0))
        observer.calculate_qparams()
        observer.reset()
        with pytest.raises(ConfigError):
            observer.calculate_qparams()
        observer(torch.full((2, 5), -1.0))
        assert observer.calculate_qparams()[0].max() < 1
