"""GPTQ with a full Hessian, with few samples, and the coordinate descent after it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qface.quantization.weight_rounding import Grid, LowRankProblem, RoundingProblem

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(2, 12))
SEEDS = st.integers(0, 2**16)


def drawn(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor, Grid]:
    """Return weights [groups, channels, K], samples [groups, N, K] and a grid of 3 bits with offsets."""
    groups, channels, samples, size = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, channels, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(groups, samples, size, generator=generator, dtype=torch.float64)
    offset = torch.randint(-3, 4, (groups, channels), generator=generator).double()
    return weight, inputs / samples**0.5, Grid(weight.abs().amax(2) / 6, offset, 2, -4, 3)


def hessian_of(samples: Tensor, damping: float) -> Tensor:
    return samples.mT @ samples + damping * torch.eye(samples.shape[2], dtype=samples.dtype)


@given(shape=SHAPES, seed=SEEDS)
def test_few_samples_round_as_their_hessian_does(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, samples, grid = drawn(shape, seed)
    damping = torch.full((len(weight),), 0.1, dtype=torch.float64)
    expected = RoundingProblem(weight, hessian_of(samples, 0.1)).gptq(grid)
    torch.testing.assert_close(LowRankProblem(weight, samples, damping).gptq(grid), expected)


@pytest.mark.parametrize("size", [511, 1300])
def test_few_samples_of_several_blocks_round_as_their_hessian_does(size: int) -> None:
    weight, samples, grid = drawn((1, 2, 20, size), seed=0)
    expected = RoundingProblem(weight, hessian_of(samples, 0.5)).gptq(grid)
    found = LowRankProblem(weight, samples, torch.tensor([0.5], dtype=torch.float64)).gptq(grid)
    torch.testing.assert_close(found, expected)


@given(shape=SHAPES, seed=SEEDS)
def test_coordinate_descent_never_adds_loss(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, samples, grid = drawn(shape, seed)
    problem = RoundingProblem(weight, hessian_of(samples, 0.01))
    rounded = problem.gptq(grid)
    improved = problem.descend(rounded, grid)
    assert (problem.losses(improved) <= problem.losses(rounded) * (1 + 1e-9) + 1e-12).all()
    codes = (improved / grid.scale[..., None] - grid.offset[..., None]) / 2
    torch.testing.assert_close(codes, codes.round().clamp(-4, 3))


def test_three_weights_come_near_the_best_of_all_roundings() -> None:
    weight, samples, grid = drawn((1, 50, 40, 3), seed=1)
    samples = samples + 2 * samples[..., :1]  # inputs that go together
    problem = RoundingProblem(weight, hessian_of(samples, 1e-6))
    choices = torch.tensor(list(itertools.product(range(-4, 4), repeat=3)), dtype=torch.float64)
    scale, offset = grid.scale[..., None], grid.offset[..., None]
    losses = torch.stack([problem.losses((2 * choice + offset) * scale) for choice in choices])
    nearest = torch.stack([grid.round(weight[..., index]) for index in range(3)], 2)
    assert torch.equal(nearest, grid.round_all(weight))
    found = problem.losses(problem.descend(problem.gptq(grid), grid))
    assert losses.amin(0).mean() <= found.mean() + 1e-12
    assert found.mean() < 1.3 * losses.amin(0).mean()
    assert found.mean() < 0.7 * problem.losses(nearest).mean()
