"""MobileFaceNet with PReLU and a global depthwise convolution.

Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices", CCBR 2018.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["MobileFaceNet"]

# (expansion, channels, repeats, stride of the first repeat)
_BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
_STEM_CHANNELS = 64
_HEAD_CHANNELS = 512


class _ConvBlock(nn.Module):
    """Convolution, BN, and PReLU unless ``linear``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        groups = inputs if depthwise else 1
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        if not linear:
            self.prelu = nn.PReLU(outputs)
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self._linear else cast(Tensor, self.prelu(x))


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise 3x3, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self._residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return cast(Tensor, x + out if self._residual else out)


class MobileFaceNet(nn.Module):
    """MobileFaceNet for 112x112 or 112x96 images.

    Args:
        num_features: embedding dimension.
        size: height and width of the images in pixels, multiples of 16.
    """

    def __init__(self, num_features: int = 128, size: tuple[int, int] = (112, 112)) -> None:
        super().__init__()
        self.conv1 = _ConvBlock(3, _STEM_CHANNELS, 3, stride=2, padding=1)
        self.dw_conv1 = _ConvBlock(_STEM_CHANNELS, _STEM_CHANNELS, 3, padding=1, depthwise=True)
        blocks: list[nn.Module] = []
        channels = _STEM_CHANNELS
        for expansion, outputs, repeats, stride in _BOTTLENECKS:
            for repeat in range(repeats):
                blocks.append(Bottleneck(channels, outputs, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = _ConvBlock(channels, _HEAD_CHANNELS, 1)
        final = (size[0] // 16, size[1] // 16)
        self.linear7 = _ConvBlock(_HEAD_CHANNELS, _HEAD_CHANNELS, final, depthwise=True, linear=True)
        self.linear1 = _ConvBlock(_HEAD_CHANNELS, num_features, 1, linear=True)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images [N, 3, *size] to embeddings [N, num_features] without L2 normalization."""
        x = self.blocks(self.dw_conv1(self.conv1(x)))
        return cast(Tensor, self.linear1(self.linear7(self.conv2(x))).flatten(1))
