"""Least-squares repair, on networks where what is lost can be had from what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.preprocessing import Preprocessing, with_preprocessing
from qface.pruning import PruningConfig, prune
from tests.networks import random_faces

SMALL = Preprocessing(size=(16, 16))


class Doubled(nn.Module):
    """Each channel of the middle twice, the second time much weaker."""

    def __init__(self, bias: bool, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=True)
        self.second = nn.Conv2d(8, 6, 3, stride=stride, padding=1, bias=bias)
        self.fc = nn.Linear(6 * (16 // stride) ** 2, 5)
        with torch.no_grad():
            self.first.weight[4:] = 0.1 * self.first.weight[:4]
            self.first.bias[4:] = 0.1 * self.first.bias[:4]
            self.second.weight[:, 4:] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_other_channels_know_is_recovered(bias: bool, stride: int) -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Doubled(bias, stride).eval(), SMALL)
    config = PruningConfig(ignored_layers=("second",), num_images=32)
    faces = random_faces(32)
    broken = prune(network, 0.5, faces, PruningConfig(ignored_layers=("second",), repair=False))
    repaired = prune(network, 0.5, faces, config)
    assert repaired.first.out_channels == 4
    images = SMALL(random_faces(8, seed=1))
    with torch.no_grad():
        wanted = network(images)
        lost, left = ((model(images) - wanted).norm() for model in (broken, repaired))
    assert left < 0.1 * lost


def test_a_mean_that_is_lost_goes_into_the_bias() -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Doubled(True, 1).eval(), SMALL)
    with torch.no_grad():
        network.first.weight[4:] = 0  # constant channels, the weakest
        network.first.bias[4:] = 1e-3
        network.second.weight[:, 4:] = 30
    repaired = prune(network, 0.5, random_faces(32), PruningConfig(ignored_layers=("second",)))
    images = SMALL(random_faces(8, seed=1))
    with torch.no_grad():
        torch.testing.assert_close(repaired(images), network(images), atol=0.05, rtol=0.05)


def test_repair_does_not_depend_on_chance() -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Doubled(True, 1).eval(), SMALL)
    one, other = (prune(network, 0.5, random_faces(32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Odd(nn.Module):
    """A layer that runs twice, and linear layers over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(6, 5)
        self.pixels, self.more = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x))))))
        x = self.more(F.relu(self.pixels(x.permute(0, 2, 3, 1))))
        return self.last(x.mean((1, 2)))


@pytest.mark.parametrize("images", [1, 8])
def test_layers_without_a_map_of_their_own_are_left_alone(images: int) -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Odd().eval(), SMALL)
    pruned = prune(network, 0.5, random_faces(images), PruningConfig(num_images=images))
    assert pruned.pixels.out_features == 6
    with torch.no_grad():
        assert pruned(SMALL(random_faces(2))).isfinite().all()


def test_a_layer_that_reads_nothing_stays_as_it_is() -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Doubled(True, 1).eval(), SMALL)
    with torch.no_grad():
        network.first.bias -= 1e3  # dead behind the ReLU
    pruned = prune(network, 0.5, random_faces(4), PruningConfig(ignored_layers=("second",)))
    assert all(parameter.isfinite().all() for parameter in pruned.parameters())
