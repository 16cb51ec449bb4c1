"""Operations that torch only has as functions, as modules: a module has a name, so it can be configured and saved."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "OWN_LAYERS",
    "Add",
    "ChannelAffine",
    "Concat",
    "L2Normalize",
    "Maximum",
    "Multiply",
    "Pad",
    "Permute",
    "Reshape",
    "Slice",
    "UpsampleNearest",
    "along_channels",
    "batch_norm_affine",
]


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


class Maximum(nn.Module):
    """Elementwise maximum of two tensors, as in a max-feature-map."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Broadcasting maximum."""
        return torch.maximum(left, right)


class Reshape(nn.Module):
    """The same values in another shape.

    Args:
        shape: the new sizes, of which one, where the batch counts, is -1.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape ``x``."""
        return x.reshape(self.shape)


class Permute(nn.Module):
    """Dimensions in another order.

    Args:
        dims: for each dimension of the output, that of the input.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(self.dims)


class Slice(nn.Module):
    """A part of one dimension.

    Args:
        dim: the dimension, not that of the batch.
        start: its first index.
        stop: one after its last index.
        step: distance of two indices.
    """

    def __init__(self, dim: int, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.start = start
        self.stop = stop
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Slice ``x``."""
        index = (slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)
        return x[index]


class Pad(nn.Module):
    """Height and width of [N, C, H, W] extended.

    Args:
        padding: pixels at the left, right, top and bottom, as ``torch.nn.functional.pad`` orders them.
        mode: ``"constant"`` (zeros), ``"reflect"`` or ``"replicate"``.
    """

    def __init__(self, padding: tuple[int, int, int, int], mode: str = "constant") -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``x``."""
        return F.pad(x, self.padding, self.mode)


class UpsampleNearest(nn.Module):
    """Each pixel of [N, C, H, W] repeated.

    Args:
        scale: how often vertically and horizontally.
    """

    def __init__(self, scale: tuple[int, int]) -> None:
        super().__init__()
        self.scale = tuple(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``x``."""
        return x.repeat_interleave(self.scale[0], 2).repeat_interleave(self.scale[1], 3)


class ChannelAffine(nn.Module):
    """``weight[c] * x + bias[c]``: what a BatchNorm with fixed statistics computes where it cannot be folded.

    Args:
        num_channels: size of dimension 1 of the input, which has 2 or 4 dimensions.
    """

    def __init__(self, num_channels: int, dim: int = 1) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        return along_channels(self.weight, x, self.dim) * x + along_channels(self.bias, x, self.dim)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> ChannelAffine:
        """The affine map that ``norm`` applies in eval mode."""
        affine = cls(norm.num_features)
        scale, shift = batch_norm_affine(norm)
        affine.weight.data.copy_(scale)
        affine.bias.data.copy_(shift)
        return affine


def along_channels(values: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """``values`` [channels] in a shape that broadcasts along dimension ``dim`` of ``x``."""
    dim %= x.ndim
    return values.view(*(1,) * dim, -1, *(1,) * (x.ndim - 1 - dim))


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, gamma / sigma and beta - mean gamma / sigma, computed in float64."""
    mean = cast(Tensor, norm.running_mean).double()
    deviation = (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(mean)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    return (gamma / deviation), (beta - mean * gamma / deviation)


OWN_LAYERS = (Add, ChannelAffine, Concat, L2Normalize, Maximum, Multiply, Pad, Permute, Reshape, Slice, UpsampleNearest)
"""All layers of this module; torch.ao keeps each of them whole."""
