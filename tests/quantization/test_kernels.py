"""The integer kernels against exact integers in numpy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qface.quantization.kernels import accumulate, choose_positive, quantize_affine, requantize
from qface.quantization.qparams import QParams

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(1e-3, 10).map(np.float32).map(float)
ZEROS = st.integers(0, 255)


def integers(rng: np.random.Generator, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(low, high, shape, endpoint=True)


def floats(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def qparams(scale: float, zero_point: int) -> QParams:
    return QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32), 0, 255)


@given(SEEDS, st.integers(1, 3000), st.sampled_from([3, 31, 127, 255]), st.booleans())
def test_linear_sums_are_exact(seed: int, width: int, largest: int, with_bias: bool) -> None:
    rng = np.random.default_rng(seed)
    x, weight = integers(rng, -largest, largest, (3, width)), integers(rng, -128, 127, (4, width))
    bias = integers(rng, -(2**24), 2**24, (4,)) if with_bias else np.zeros(4, np.int64)
    sums = accumulate(F.linear, floats(x), floats(weight), floats(bias) if with_bias else None)
    np.testing.assert_array_equal(sums.numpy(), (x @ weight.T + bias).astype(np.float32))


@given(
    SEEDS,
    st.sampled_from([(1, 3, 1), (4, 4, 1), (8, 16, 1), (8, 8, 8), (64, 8, 1)]),
    st.sampled_from([1, 3]),
    st.sampled_from([63, 255]),
)
def test_convolution_sums_are_exact(seed: int, channels: tuple[int, int, int], kernel: int, largest: int) -> None:
    inputs, outputs, groups = channels
    rng = np.random.default_rng(seed)
    x = integers(rng, -largest, largest, (2, inputs, 6, 5))
    weight = integers(rng, -128, 127, (outputs, inputs // groups, kernel, kernel))
    bias = integers(rng, -(2**20), 2**20, (outputs, 1, 1))
    sums = accumulate(
        lambda a, b: F.conv2d(a, b, padding=kernel // 2, groups=groups), floats(x), floats(weight), floats(bias)
    )
    exact = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=kernel // 2, groups=groups).numpy() + bias
    np.testing.assert_array_equal(sums.numpy(), exact.astype(np.float32))


@given(SEEDS, st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_values_of_any_size_are_chosen_by_sign(seed: int, memory_format: torch.memory_format) -> None:
    rng = np.random.default_rng(seed)
    x, positive, other = (
        floats(integers(rng, -3, 3, (2, 3, 4, 5)) * 10.0 ** rng.integers(-9, 9, (2, 3, 4, 5))) for _ in range(3)
    )
    expected = torch.where(x > 0, positive, other)
    chosen = choose_positive(*(each.contiguous(memory_format=memory_format) for each in (x, positive, other)))
    assert torch.equal(chosen, expected)


@given(SEEDS, st.integers(2, 8))
def test_requantize_is_the_float32_product_rounded_half_to_even(seed: int, outputs: int) -> None:
    rng = np.random.default_rng(seed)
    sums = integers(rng, -(2**22), 2**22, (3, outputs)).astype(np.float32)
    first, last = rng.uniform(1e-3, 0.1, (2, 1)).astype(np.float32)
    weight = rng.uniform(1e-4, 0.1, (1, outputs)).astype(np.float32)
    expected = np.round(sums * (first * weight / last))
    result = requantize(torch.from_numpy(sums.copy()), *(torch.from_numpy(v) for v in (first, weight, last)))
    np.testing.assert_array_equal(result.numpy(), expected)


@given(SEEDS, SCALES, ZEROS)
def test_quantize_affine_divides_and_rounds_half_to_even(seed: int, scale: float, zero_point: int) -> None:
    x = np.random.default_rng(seed).normal(0, 50 * scale, 200).astype(np.float32)
    x[:4] = np.float32(scale) * np.array([0.5, 1.5, 2.5, -0.5], np.float32)
    one = qparams(scale, zero_point)
    expected = np.clip(np.round(x / np.float32(scale)) + zero_point, 0, 255)
    np.testing.assert_array_equal(quantize_affine(torch.from_numpy(x), *one).numpy(), expected)
