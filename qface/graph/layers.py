"""Modules for functions of torch, so that they have names and can be configured and saved."""

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
    "FakeQuantizer",
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


class FakeQuantizer:
    """Marker of the modules that fake-quantize a tensor; a network that contains one is a student."""


class Add(nn.Module):
    """Sum of two tensors, as in a residual connection."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the broadcast sum."""
        return left + right


class Multiply(nn.Module):
    """Product of two tensors, as in a squeeze-and-excite gate."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the broadcast product."""
        return left * right


class Concat(nn.Module):
    """Concatenation of tensors.

    Args:
        dim: dimension along which they are concatenated.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Concatenate ``tensors``."""
        return torch.cat(tensors, self.dim)


class L2Normalize(nn.Module):
    """L2 normalization of the rows of a tensor [N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        return F.normalize(x)


class Maximum(nn.Module):
    """Elementwise maximum of two tensors, as in a max-feature-map."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the broadcast maximum."""
        return torch.maximum(left, right)


class Reshape(nn.Module):
    """Change of shape.

    Args:
        shape: the new sizes, with -1 for the one that depends on the batch size.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape ``x``."""
        return x.reshape(self.shape)


class Permute(nn.Module):
    """Permutation of dimensions.

    Args:
        dims: the input dimension of each output dimension.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(self.dims)


class Slice(nn.Module):
    """Slice of one dimension.

    Args:
        dim: the dimension, other than the batch.
        start: first index.
        stop: index after the last one.
        step: distance between indices.
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
    """Padding of height and width, and perhaps of channels, of [N, C, H, W].

    Args:
        padding: pixels at the left, right, top and bottom, in the order of ``torch.nn.functional.pad``; perhaps
            followed by the number of channels of zeros before and after those of the input.
        mode: ``"constant"`` (zeros), ``"reflect"`` or ``"replicate"``.
    """

    def __init__(self, padding: tuple[int, ...], mode: str = "constant") -> None:
        super().__init__()
        self.padding = tuple(padding if any(padding[4:]) else padding[:4])
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``x``."""
        return F.pad(x, self.padding, self.mode)


class UpsampleNearest(nn.Module):
    """Nearest-neighbor upsampling of [N, C, H, W] by integer factors.

    Args:
        scale: factors of height and width.
    """

    def __init__(self, scale: tuple[int, int]) -> None:
        super().__init__()
        self.scale = tuple(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``x``."""
        return x.repeat_interleave(self.scale[0], 2).repeat_interleave(self.scale[1], 3)


class ChannelAffine(nn.Module):
    """Per-channel ``weight[c] * x + bias[c]``, such as a BatchNorm in eval mode that cannot be folded.

    Args:
        num_channels: size of dimension ``dim`` of the input, or 1 for a scalar map.
        dim: dimension of the channels.
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
        """Return the affine map that ``norm`` computes in eval mode."""
        affine = cls(norm.num_features)
        scale, shift = batch_norm_affine(norm)
        affine.weight.data.copy_(scale)
        affine.bias.data.copy_(shift)
        return affine


def along_channels(values: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """Reshape ``values`` [channels] so that they broadcast along dimension ``dim`` of ``x``."""
    dim %= x.ndim
    return values.view(*(1,) * dim, -1, *(1,) * (x.ndim - 1 - dim))


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale ``gamma / sigma`` and shift ``beta - mean * gamma / sigma`` per channel, in float64."""
    mean = cast(Tensor, norm.running_mean).double()
    deviation = (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
    gamma = norm.weight.detach().double() if norm.affine else torch.ones_like(mean)
    beta = norm.bias.detach().double() if norm.affine else torch.zeros_like(mean)
    return (gamma / deviation), (beta - mean * gamma / deviation)


OWN_LAYERS = (Add, ChannelAffine, Concat, L2Normalize, Maximum, Multiply, Pad, Permute, Reshape, Slice, UpsampleNearest)
"""All layers of this module; torch.ao must not trace into them."""
