"""Two small face networks that tests of several folders share: one like IResNet, one unlike anything in qface."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface import CalibrationConfig

SIZE = (112, 112)
RANGES_ONLY = CalibrationConfig(equalize=False, gptq=False, correct_biases=False)
"""Enough for tests of what follows calibration: the arithmetic of a student is the same."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def seeded(kind: type[ModuleT], seed: int = 0, dim: int = 16, size: tuple[int, int] = SIZE) -> ModuleT:
    """``kind(dim, size)`` in eval mode with repeatable weights and running statistics that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return with_statistics(kind(dim, size)).eval()


def with_statistics(model: ModuleT) -> ModuleT:
    """Random affine parameters and running statistics for every BatchNorm, slopes for every PReLU, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(0.1, 0.4)
    return model


def tiny_face_net(seed: int = 0, dim: int = 16, size: tuple[int, int] = SIZE) -> TinyFaceNet:
    """A repeatable :class:`TinyFaceNet` in eval mode."""
    return seeded(TinyFaceNet, seed, dim, size)


def foreign_net(seed: int = 0, dim: int = 16, size: tuple[int, int] = SIZE) -> ForeignNet:
    """A repeatable :class:`ForeignNet` in eval mode."""
    return seeded(ForeignNet, seed, dim, size)


def random_faces(count: int = 8, seed: int = 0) -> Tensor:
    """Smooth random crops, uint8 [count, 3, 112, 112]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator) * 255
    return F.interpolate(coarse, SIZE, mode="bilinear").round().to(torch.uint8)


class Residual(nn.Module):
    """BN, convolution, BN, PReLU, convolution, BN and a shortcut, as IResNet has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return cast(Tensor, self.bn3(self.conv2(out)) + x)


class TinyFaceNet(nn.Module):
    """Conv-BN-PReLU, pooling, two residual blocks, dropout, a linear embedding with BN."""

    def __init__(self, dim: int = 16, size: tuple[int, int] = SIZE) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.prelu = nn.PReLU(8)
        self.pool = nn.MaxPool2d(2)
        self.block1 = Residual(8)
        self.block2 = Residual(8)
        self.last = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.4)
        height, width = (((side - 1) // 4 + 1) // 2 for side in size)
        self.fc = nn.Linear(8 * height * width, dim)
        self.features = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.prelu(self.bn(self.conv(x))))
        x = self.last(self.block2(self.block1(x)))
        return cast(Tensor, self.features(self.fc(torch.flatten(self.dropout(x), 1))))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excite written with functions, projection, shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, 4, 1)
        self.excite = nn.Conv2d(4, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn(self.depthwise(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return cast(Tensor, x + self.project(out * gate))


class ForeignNet(nn.Module):
    """What other face networks do: hard-swish, inverted residuals, concatenation, functions, ``view``."""

    def __init__(self, dim: int = 16, size: tuple[int, int] = SIZE) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1, bias=False), nn.BatchNorm2d(8))
        self.act = nn.Hardswish()
        self.block = InvertedResidual(8)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        height, width = ((side - 1) // 8 + 1 for side in size)
        self.embed = nn.Linear(8 * height * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.stem(x)))
        x = F.relu(torch.cat([self.left(x), self.right(x)], dim=1))
        return cast(Tensor, self.embed(x.view(x.size(0), -1)))
