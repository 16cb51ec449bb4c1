"""Quantize a network that qface does not know; any network that torch.export captures will do.

python examples/your_own_network.py faces/
"""

import sys

import torch
from torch import Tensor, nn

import qface


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from its mean over the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(torch.relu(self.down(gate))))


class Embedder(nn.Module):
    """A small network from images `[N, 3, 112, 112]` to embeddings `[N, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.Hardswish())
        self.excite = SqueezeExcite(32)
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU6())
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.excite(self.stem(x)))
        return self.head(x.mean((2, 3)))


faces = sys.argv[1]
network = Embedder().eval()
# network = qface.load("weights.pth", model=Embedder(), preprocessing=qface.Preprocessing(color="BGR"))

student = qface.calibrate(qface.quantize(network, bits=6), faces)
qface.export(student, "own.onnx")
print(qface.evaluate("own.onnx", faces).tpr_at_fpr)
