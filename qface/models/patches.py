"""Input patches (im2col) of a convolution or linear layer at random output positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layer", "Positions", "output_size", "outputs_at", "patches"]

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Positions:
    """Positions in a layer's output.

    Args:
        image: index in the batch, [M].
        row: row in the output map, [M].
        column: column in the output map, [M].
    """

    image: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def drawn(cls, images: int, height: int, width: int, most: int, generator: torch.Generator) -> Positions:
        """Draw at most ``most`` different positions of a batch of output maps."""
        chosen = torch.randperm(images * height * width, generator=generator)[:most].sort().values
        return cls(chosen // (height * width), chosen // width % height, chosen % width)

    def within(self, start: int, count: int) -> Positions:
        """Return the positions in images ``start`` to ``start + count - 1``, with ``start`` renumbered to 0."""
        inside = (self.image >= start) & (self.image < start + count)
        return Positions(self.image[inside] - start, self.row[inside], self.column[inside])


def output_size(layer: Layer, shape: torch.Size) -> tuple[int, int]:
    """Return height and width of a layer's output of this ``shape``; a linear layer has one column of positions."""
    if isinstance(layer, nn.Linear):
        return math.prod(shape[1:-1]), 1
    return shape[2], shape[3]


def outputs_at(layer: Layer, output: Tensor, positions: Positions) -> Tensor:
    """Return the ``output`` of ``layer`` at M positions, [M, channels]."""
    if isinstance(layer, nn.Linear):
        return output.reshape(len(output), -1, output.shape[-1])[positions.image, positions.row]
    return output[positions.image, :, positions.row, positions.column]


def patches(layer: Layer, x: Tensor, positions: Positions) -> Tensor:
    """Return the inputs of ``layer`` at some output positions.

    Args:
        layer: a convolution or linear layer.
        x: the layer's input, [N, C, H, W], or of a linear layer [N, ..., C].
        positions: M positions in its output.

    Returns:
        All channels under the kernel at each position, [M, C * kernel height * kernel width].
    """
    if isinstance(layer, nn.Linear):
        return outputs_at(layer, x, positions)
    height, width = layer.kernel_size
    # torch's private attribute also resolves padding="same".
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    rows = positions.row[:, None] * layer.stride[0] + torch.arange(height) * layer.dilation[0]
    columns = positions.column[:, None] * layer.stride[1] + torch.arange(width) * layer.dilation[1]
    # [M, height, width, channels]
    found = padded[positions.image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).flatten(1)
