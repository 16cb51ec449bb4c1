"""IResNet, the recognition backbone of InsightFace's arcface_torch, with the same state dict names.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["IRESNET_BLOCKS", "IResNet", "IResNetBlock", "iresnet"]

IRESNET_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}
"""Residual blocks per stage for each depth."""

_WIDTHS = (64, 128, 256, 512)
_FINAL_SIDE = 7  # a 112x112 image after four halvings
_BN_EPS = 1e-5


class IResNetBlock(nn.Module):
    """Pre-normalized residual block: BN, conv, BN, PReLU, strided conv, BN, plus the residual connection."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes, eps=_BN_EPS)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=_BN_EPS)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes, eps=_BN_EPS)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes, eps=_BN_EPS),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inplanes, H, W] to [N, planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return cast(Tensor, self.bn3(self.conv2(out)) + shortcut)


class IResNet(nn.Module):
    """IResNet for 112x112 images.

    Args:
        blocks: residual blocks per stage.
        num_features: embedding dimension.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_features: int = 512) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0], eps=_BN_EPS)
        self.prelu = nn.PReLU(_WIDTHS[0])
        inplanes = _WIDTHS[0]
        for stage, (planes, count) in enumerate(zip(_WIDTHS, blocks, strict=True), start=1):
            self.add_module(f"layer{stage}", _stage(inplanes, planes, count))
            inplanes = planes
        self.bn2 = nn.BatchNorm2d(inplanes, eps=_BN_EPS)
        self.dropout = nn.Dropout(p=0.0)
        self.fc = nn.Linear(inplanes * _FINAL_SIDE**2, num_features)
        self.features = nn.BatchNorm1d(num_features, eps=_BN_EPS)
        # arcface_torch freezes the last scale, since training could only use it to change the embedding norm.
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images [N, 3, 112, 112] to embeddings [N, num_features] without L2 normalization."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        x = self.dropout(self.bn2(x).flatten(1))
        return cast(Tensor, self.features(self.fc(x)))


def _stage(inplanes: int, planes: int, count: int) -> nn.Sequential:
    first = IResNetBlock(inplanes, planes, stride=2)
    return nn.Sequential(first, *(IResNetBlock(planes, planes, stride=1) for _ in range(count - 1)))


def iresnet(depth: int, num_features: int = 512) -> IResNet:
    """Return an IResNet with random weights.

    Args:
        depth: 18, 34, 50, 100 or 200.
        num_features: embedding dimension.

    Raises:
        KeyError: ``depth`` is another number.
    """
    return IResNet(IRESNET_BLOCKS[depth], num_features)
