"""Operations that torch only has as functions, as modules: a module has a name, so it can be configured and saved."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Add", "ChannelAffine", "Concat", "L2Normalize", "Multiply", "along_channels"]


class Add(nn.Module):
    """Sum of two tensors, as in a residual connection."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Broadcasting sum."""
        return left + right


class Multiply(nn.Module):
    """Product of two tensors, as in a squeeze-and-excite gate."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Broadcasting product."""
        return left * right


class Concat(nn.Module):
    """Concatenation along ``dim``."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """All ``tensors`` one behind the other."""
        return torch.cat(tensors, self.dim)


class L2Normalize(nn.Module):
    """Rows of a [N, D] tensor divided by their Euclidean norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Unit rows."""
        return F.normalize(x)


class ChannelAffine(nn.Module):
    """``weight[c] * x + bias[c]``: what a BatchNorm with fixed statistics computes where it cannot be folded.

    Args:
        num_channels: size of dimension 1 of the input, which has 2 or 4 dimensions.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return along_channels(self.weight, x) * x + along_channels(self.bias, x)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> ChannelAffine:
        """The affine map that ``norm`` applies in eval mode."""
        affine = cls(norm.num_features)
        scale, shift = batch_norm_affine(norm)
        affine.weight.data.copy_(scale)
        affine.bias.data.copy_(shift)
        return affine


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """``values`` [channels] in a shape that broadcasts along dimension 1 of ``x``."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, gamma / sigma and beta - mean gamma / sigma, computed in float64."""
    mean = cast(Tensor, norm.running_mean).double()
    deviation = (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(mean)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    return (gamma / deviation), (beta - mean * gamma / deviation)
