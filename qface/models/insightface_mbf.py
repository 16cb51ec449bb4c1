"""InsightFace's MobileFaceNet variant, which arcface_torch trains as ``mbf`` and ``mbf_large``.

It is wider than the network of the paper (:mod:`qface.models.mobilefacenet`) and ends with a linear layer and a
BatchNorm. Layer names match ``recognition/arcface_torch/backbones/mobilefacenet.py``, so its checkpoints load.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["MBF_BLOCKS", "InsightFaceMobileFaceNet"]

MBF_BLOCKS = (1, 4, 6, 2)
"""Blocks per resolution of ``mbf``, whose scale is 2; ``mbf_large`` has (2, 8, 12, 4) and scale 4."""
_HEAD_CHANNELS = 512


class _Layers(nn.Module):
    """A sequence named ``layers``, optionally with a residual connection."""

    def __init__(self, *layers: nn.Module, shortcut: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self._shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return cast(Tensor, x + out if self._shortcut else out)


def _conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0, groups: int = 1, prelu: bool = True
) -> _Layers:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    activation = [nn.PReLU(outputs)] if prelu else []
    return _Layers(convolution, nn.BatchNorm2d(outputs), *activation)


def _bottleneck(inputs: int, outputs: int, hidden: int, stride: int = 1) -> _Layers:
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; with a residual connection if the stride is 1."""
    return _Layers(
        _conv(inputs, hidden),
        _conv(hidden, hidden, 3, stride, 1, groups=hidden),
        _conv(hidden, outputs, prelu=False),
        shortcut=stride == 1,
    )


def _repeated(channels: int, hidden: int, blocks: int) -> _Layers:
    return _Layers(*(_bottleneck(channels, channels, hidden) for _ in range(blocks)))


class InsightFaceMobileFaceNet(nn.Module):
    """MobileFaceNet of InsightFace's arcface_torch for 112x112 images.

    Args:
        num_features: embedding dimension.
        blocks: residual bottlenecks at each of the four resolutions; 1 at the first one is a grouped convolution.
        scale: multiplier of the number of channels outside the bottlenecks.
    """

    def __init__(self, num_features: int = 512, blocks: tuple[int, int, int, int] = MBF_BLOCKS, scale: int = 2) -> None:
        super().__init__()
        narrow, wide = 64 * scale, 128 * scale
        second = _conv(narrow, narrow, 3, 1, 1, groups=64) if blocks[0] == 1 else _repeated(narrow, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                _conv(3, narrow, 3, 2, 1),
                second,
                _bottleneck(narrow, narrow, 128, stride=2),
                _repeated(narrow, 128, blocks[1]),
                _bottleneck(narrow, wide, 256, stride=2),
                _repeated(wide, 256, blocks[2]),
                _bottleneck(wide, wide, 512, stride=2),
                _repeated(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = _conv(wide, _HEAD_CHANNELS)
        self.features = _Layers(
            _conv(_HEAD_CHANNELS, _HEAD_CHANNELS, 7, groups=_HEAD_CHANNELS, prelu=False),
            nn.Flatten(),
            nn.Linear(_HEAD_CHANNELS, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images [N, 3, 112, 112] to embeddings [N, num_features] without L2 normalization."""
        for layer in self.layers:
            x = layer(x)
        return cast(Tensor, self.features(self.conv_sep(x)))
