"""GPTQ with a full Hessian, with few samples, and the coordinate descent after it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qface.quantization.weight_rounding import ChannelQParams, LowRankProblem, RoundingProblem, cholesky

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(2, 12))
SEEDS = st.integers(0, 2**16)


def drawn(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor, ChannelQParams]:
    """Return weights [groups, channels, K], samples [groups, N, K] and parameters of 3 bits with offsets."""
    groups, channels, samples, size = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, channels, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(groups, samples, size, generator=generator, dtype=torch.float64)
    offset = torch.randint(-3, 4, (groups, channels), generator=generator).double()
    return weight, inputs / samples**0.5, ChannelQParams(weight.abs().amax(2) / 6, offset, 2, -4, 3)


def hessian_of(samples: Tensor, damping: float) -> Tensor:
    return samples.mT @ samples + damping * torch.eye(samples.shape[2], dtype=samples.dtype)


@given(shape=SHAPES, seed=SEEDS)
def test_few_samples_round_as_their_hessian_does(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, samples, qparams = drawn(shape, seed)
    damping = torch.full((len(weight),), 0.1, dtype=torch.float64)
    expected = RoundingProblem(weight, hessian_of(samples, 0.1)).gptq(qparams)
    torch.testing.assert_close(LowRankProblem(weight, samples, damping).gptq(qparams), expected)


@pytest.mark.parametrize("size", [511, 1300])
def test_few_samples_of_several_blocks_round_as_their_hessian_does(size: int) -> None:
    weight, samples, qparams = drawn((1, 2, 20, size), seed=0)
    expected = RoundingProblem(weight, hessian_of(samples, 0.5)).gptq(qparams)
    found = LowRankProblem(weight, samples, torch.tensor([0.5], dtype=torch.float64)).gptq(qparams)
    torch.testing.assert_close(found, expected)


@given(shape=SHAPES, seed=SEEDS)
def test_coordinate_descent_never_adds_loss(shape: tuple[int, int, int, int], seed: int) -> None:
    weight, samples, qparams = drawn(shape, seed)
    problem = RoundingProblem(weight, hessian_of(samples, 0.01))
    rounded = problem.gptq(qparams)
    improved = problem.descend(rounded, qparams)
    assert (problem.losses(improved) <= problem.losses(rounded) * (1 + 1e-9) + 1e-12).all()
    codes = (improved / qparams.scale[..., None] - qparams.offset[..., None]) / 2
    torch.testing.assert_close(codes, codes.round().clamp(-4, 3))


@given(shape=SHAPES, seed=SEEDS, descends=st.booleans())
def test_several_parameters_at_once_round_as_each_alone(
    shape: tuple[int, int, int, int], seed: int, descends: bool
) -> None:
    weight, samples, qparams = drawn(shape, seed)
    problem = RoundingProblem(weight, hessian_of(samples, 0.1))
    tried = [qparams, replace(qparams, scale=1.5 * qparams.scale), replace(qparams, offset=-qparams.offset)]
    rounded, losses = problem.rounded_by_each(tried, descends)
    for number, each in enumerate(tried):
        alone = problem.gptq(each)
        alone = problem.descend(alone, each) if descends else alone
        torch.testing.assert_close(rounded[:, number], alone)
        torch.testing.assert_close(losses[:, number], problem.losses(alone))


def test_a_group_that_is_not_positive_definite_leaves_the_others_alone() -> None:
    """Such as a channel of a depthwise convolution that is constant but for rounding."""
    matrix = hessian_of(torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0)).double(), 0.0)
    matrix[1] = torch.diag(torch.tensor([1e-9, -1e-9, 2e-9, -3e-9]))
    factor = cholesky(matrix)
    assert factor.isfinite().all()
    torch.testing.assert_close((factor @ factor.mT)[::2], matrix[::2])
    torch.testing.assert_close(cholesky(torch.zeros(2, 3, 3).double()).triu(1), torch.zeros(2, 3, 3).double())


def test_three_weights_come_near_the_best_of_all_roundings() -> None:
    weight, samples, qparams = drawn((1, 50, 40, 3), seed=1)
    samples = samples + 2 * samples[..., :1]  # inputs that go together
    problem = RoundingProblem(weight, hessian_of(samples, 1e-6))
    choices = torch.tensor(list(itertools.product(range(-4, 4), repeat=3)), dtype=torch.float64)
    scale, offset = qparams.scale[..., None], qparams.offset[..., None]
    losses = torch.stack([problem.losses((2 * choice + offset) * scale) for choice in choices])
    nearest = torch.stack([qparams.round(weight[..., index]) for index in range(3)], 2)
    assert torch.equal(nearest, qparams.round_all(weight))
    found = problem.losses(problem.descend(problem.gptq(qparams), qparams))
    assert losses.amin(0).mean() <= found.mean() + 1e-12
    assert found.mean() < 1.3 * losses.amin(0).mean()
    assert found.mean() < 0.7 * problem.losses(nearest).mean()
