"""Adam in parts of the size of what it moves: factors that equalization moves between layers change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qface.distillation.relative_adam import RelativeAdam, sizes


class Pair(nn.Module):
    """Two layers, between which a factor can pass through a ReLU."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.back = nn.Conv2d(3, 6, kernel), nn.Conv2d(6, 4, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.front(x))).mean((2, 3))


def train(model: nn.Module, steps: int = 20, lr: float = 1e-2) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    images, wanted = torch.randn(16, 3, 5, 5, generator=generator), torch.randn(16, 4, generator=generator)
    optimizer, losses = RelativeAdam(model.parameters(), lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(images) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@given(st.floats(-2, 2))
def test_one_factor_between_two_layers_changes_nothing(exponent: float) -> None:
    model = Pair()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.front.weight.mul_(10**exponent)
        scaled.front.bias.mul_(10**exponent)
        scaled.back.weight.div_(10**exponent)
    assert train(scaled) == pytest.approx(train(model), rel=1e-3)


def test_factors_of_channels_change_little() -> None:
    """Exactly nothing where weights are a product of rows and columns, which trained ones are only about."""
    model = Pair()
    scaled = copy.deepcopy(model)
    factors = torch.logspace(-1.5, 1.5, 6)
    with torch.no_grad():
        scaled.front.weight.mul_(factors.view(-1, 1, 1, 1))
        scaled.front.bias.mul_(factors)
        scaled.back.weight.div_(factors.view(1, -1, 1, 1))
    relative = train(scaled)[-1] / train(model)[-1]
    assert 0.9 < relative < 1.1

    def plain(network: nn.Module) -> float:
        optimizer = torch.optim.SGD(network.parameters(), 1e-2)
        images = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = network(images) + 1
        for _ in range(20):
            optimizer.zero_grad()
            loss = (network(images) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    fresh = Pair()
    uneven = copy.deepcopy(fresh)
    with torch.no_grad():
        uneven.front.weight.mul_(factors.view(-1, 1, 1, 1))
        uneven.front.bias.mul_(factors)
        uneven.back.weight.div_(factors.view(1, -1, 1, 1))
    assert not 0.9 < plain(uneven) / plain(fresh) < 1.1  # SGD sees them


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.lists(st.floats(0.1, 10), min_size=5, max_size=5))
def test_sizes_of_a_product_are_its_values(rows: list[float], columns: list[float]) -> None:
    matrix = torch.tensor(rows)[:, None] * torch.tensor(columns)
    torch.testing.assert_close(sizes(matrix).expand_as(matrix), matrix, rtol=1e-2, atol=1e-5)


def test_sizes_of_few_dimensions_and_of_zeros() -> None:
    assert sizes(torch.tensor([1.0, -3.0, 0.0])).tolist() == pytest.approx([1, 3, 0.4 / 3])
    assert sizes(torch.zeros(3, 2)).tolist() == [[1, 1]] * 3
    half = torch.ones(2, 2)
    half[1] = 0
    assert (sizes(half) > 0).all()  # a dead row can still learn


def test_a_step_is_a_part_of_the_size() -> None:
    weight = nn.Parameter(torch.tensor([[4.0, 4.0], [1.0, 1.0]]))
    weight.grad = torch.tensor([[1e-6, -1e3], [1.0, 0.0]])
    before = weight.detach().clone()
    RelativeAdam([weight], lr=1e-2).step()
    moved = (weight.detach() - before) / before
    torch.testing.assert_close(moved, torch.tensor([[-1e-2, 1e-2], [-1e-2, 0.0]]), rtol=1e-3, atol=1e-6)


def test_what_has_no_gradient_stays() -> None:
    still = nn.Parameter(torch.ones(2))
    RelativeAdam([still]).step()
    assert still.tolist() == [1, 1]
    assert RelativeAdam([still]).step(lambda: 3.0) == 3.0
