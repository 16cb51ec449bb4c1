"""Networks that the tests of the export build: one frame around whatever is to be tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx, nn

from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import QuantizationConfig, calibrate, quantize
from tests.networks import RANGES_ONLY, random_faces, with_statistics

CHANNELS = 8
SIDE = 24


class Framed(nn.Module):
    """A strided convolution, ``body`` on [N, 8, 12, 12], and a linear embedding of whatever comes out."""

    def __init__(self, body: nn.Module, dim: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        self.body = body
        with torch.no_grad():
            features = self.body.eval()(self.stem(torch.zeros(1, 3, SIDE, SIDE))).flatten(1).shape[1]
        self.fc = nn.Linear(features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(torch.flatten(self.body(self.stem(x)), 1)))


class Sum(nn.Module):
    """``left(x) + right(x)``."""

    def __init__(self, left: nn.Module, right: nn.Module | None = None) -> None:
        super().__init__()
        self.left = left
        self.right = right or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.left(x) + self.right(x))


class Gate(nn.Module):
    """Squeeze-and-excite with ``activation`` as its gate."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x * self.activation(self.conv(self.pool(x))))


class Joined(nn.Module):
    """Both results one behind the other along the channels."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Applied(nn.Module):
    """Any function of the tensor."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def prelu(*slopes: float) -> nn.PReLU:
    """A PReLU whose channels take turns with ``slopes``; one slope is one for all channels."""
    layer = nn.PReLU(1 if len(slopes) == 1 else CHANNELS)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(slopes).repeat(CHANNELS)[: layer.num_parameters])
    return layer


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What ``build`` makes, with repeatable weights and slopes that ``build`` chose, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        slopes = {layer: layer.weight.detach().clone() for layer in model.modules() if isinstance(layer, nn.PReLU)}
        with_statistics(model)
        for layer, weight in slopes.items():
            layer.weight.data.copy_(weight)
    return model.eval()


def framed(body: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """:class:`Framed`, repeatable, with the preprocessing that fits it."""
    return with_preprocessing(seeded(lambda: Framed(body()), seed), Preprocessing(size=(SIDE, SIDE)))


def calibrated(model: nn.Module, bits: int | QuantizationConfig = 4) -> fx.GraphModule:
    """A student of ``model`` with calibrated ranges."""
    return calibrate(quantize(model, bits), random_faces(8), RANGES_ONLY)
