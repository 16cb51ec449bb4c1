"""PReLU before quantization computes what it computed, with slopes that integer kernels like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qface.graph import canonicalize
from tests.deployment.networks import CHANNELS, Sum, framed, prelu
from tests.networks import random_faces

STEEP = (0.2, 1.5, -0.5, 3.0)
NEIGHBORS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), prelu(*STEEP), nn.Conv2d(8, 4, 1)),
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), prelu(*STEEP), nn.Conv2d(8, 16, 3, groups=4)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), prelu(*STEEP), nn.Conv2d(8, 8, 3, groups=8, bias=False)),
    "batch norms": lambda: nn.Sequential(
        nn.MaxPool2d(2), nn.BatchNorm2d(8), prelu(*STEEP), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    ),
    "one slope": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), prelu(1.5), nn.Conv2d(8, 8, 1)),
}


class Twice(nn.Module):
    """Two readers of one PReLU, as in a network whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.prelu = nn.Conv2d(8, 8, 3, padding=1), prelu(*STEEP)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.front(x))
        return self.left(x) + self.right(x)


def slopes(network: fx.GraphModule) -> list[Tensor]:
    return [layer.weight.detach() for layer in network.modules() if isinstance(layer, nn.PReLU)]


def assert_equal(model: nn.Module, network: nn.Module) -> None:
    images = random_faces(4)[:, :, :24, :24] / 255
    with torch.no_grad():
        assert torch.allclose(network(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [*NEIGHBORS.values(), Twice], ids=[*NEIGHBORS, "two readers"])
def test_slopes_above_one_pass_into_the_neighbors(body: Callable[[], nn.Module]) -> None:
    model = framed(body)
    network = canonicalize(model)
    assert_equal(model, network)
    (found,) = slopes(network)
    assert len(found) == CHANNELS
    assert found.max() <= 1
    if body is not NEIGHBORS["one slope"]:
        assert torch.allclose(found[:4], torch.tensor([0.2, 1 / 1.5, -0.5, 1 / 3.0]))


@pytest.mark.parametrize(
    "body",
    [
        lambda: nn.Sequential(nn.MaxPool2d(2), prelu(*STEEP), nn.Conv2d(8, 8, 3)),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), prelu(*STEEP), nn.MaxPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), prelu(*STEEP), Sum(nn.Identity())),
    ],
    ids=["no weights in front", "no weights behind", "a sum behind"],
)
def test_slopes_stay_where_nothing_can_take_the_factor(body: Callable[[], nn.Module]) -> None:
    model = framed(body)
    network = canonicalize(model)
    assert_equal(model, network)
    assert slopes(network)[0].max() == 3


def test_a_convolution_over_the_whole_map_is_a_linear_layer() -> None:
    model = framed(lambda: nn.Identity())
    model.stem, model.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 10))
    model.fc = nn.Identity()
    network = canonicalize(model)
    assert_equal(model, network)
    assert isinstance(network.get_submodule("body.1"), nn.Linear)
    assert network.get_submodule("body.1").weight.shape == (5, 800)
