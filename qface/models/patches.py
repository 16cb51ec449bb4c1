"""Inputs that a convolution or linear layer multiplies with its weights, at places drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layer", "Positions", "as_map", "patches"]

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Positions:
    """Positions in a layer's output: image, row and column, each [M]."""

    image: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def drawn(cls, images: int, height: int, width: int, most: int, generator: torch.Generator) -> Positions:
        """At most ``most`` different ones."""
        chosen = torch.randperm(images * height * width, generator=generator)[:most].sort().values
        return cls(chosen // (height * width), chosen // width % height, chosen % width)

    def within(self, start: int, count: int) -> Positions:
        """Those of ``count`` images from ``start`` on, images numbered from 0."""
        inside = (self.image >= start) & (self.image < start + count)
        return Positions(self.image[inside] - start, self.row[inside], self.column[inside])


def as_map(x: Tensor) -> Tensor:
    """``x`` as [N, channels, height, width]."""
    return x[:, :, None, None] if x.ndim == 2 else x


def patches(layer: Layer, x: Tensor, positions: Positions) -> Tensor:
    """The values of ``x`` under the kernel at these outputs, [M, inputs x height x width of the kernel]."""
    if isinstance(layer, nn.Linear):
        return x[positions.image]
    height, width = layer.kernel_size
    # Torch's own: the padding of each side, for padding by name too.
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    rows = positions.row[:, None] * layer.stride[0] + torch.arange(height) * layer.dilation[0]
    columns = positions.column[:, None] * layer.stride[1] + torch.arange(width) * layer.dilation[1]
    # [M, height, width, channels]
    found = padded[positions.image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).flatten(1)
