"""GPTQ: what the rounding of a weight changes, the weights that are rounded after it make up for.

A layer's output loses least where the error of its weights is small in the metric of the second moments H of what it
reads: error' H error. Weight by weight in order, each takes the share of the errors before it that it can make up for
(Hassibi and Stork, Optimal Brain Surgeon, 1993; Frantar et al., GPTQ, ICLR 2023). The shares are those of a triangular
factor of H, so that no inverse is needed (Chee et al., QuIP, NeurIPS 2023, theorem 6: GPTQ is LDLQ). Weights end as
multiples of the scales that they have; ranges do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qface.models.patches import Layer, Positions, as_map, patches
from qface.progress import track
from qface.quantization.quantized_layers import WeightedLayer

__all__ = ["HessianCollector", "gptq"]

_POSITIONS = 1024  # of a layer and batch
_PERCDAMP = 1e-2
"""Hessian damping, as a fraction of mean(diag(H)), plus num_weights / num_samples.

Few samples say little of how inputs vary together: what they do not show, GPTQ would spoil.
"""
_PRECISION = 4 * torch.finfo(torch.float32).eps
"""Error of products in float32, in parts of them, for each weight.

A mean is taken off that may be nearly all of them, and the errors of all weights may have one direction.
"""
_BLOCK = 128  # weights, whose errors reach those behind the block all at once, by one product
_PRODUCTS = 1024  # rows of a matrix of products that are computed at once, as far as they are not those of others
_MOST_WEIGHTS = 4608
"""Maximum weights of a channel, 512 x 3 x 3: the Hessian of more takes gigabytes, so those are rounded to nearest."""


@dataclass
class _Moments:
    """Sums over what a layer reads.

    Args:
        count: of positions.
        sums: of their values, float64 [groups, weights of a channel].
        products: of each two values, float64 [groups, weights, weights]; those above the diagonal count.
    """

    count: int
    sums: Tensor
    products: Tensor

    @classmethod
    def none(cls, groups: int, weights: int) -> _Moments:
        """Of nothing seen."""
        zeros = torch.zeros(groups, weights, weights, dtype=torch.float64)
        return cls(0, zeros[:, 0].clone(), zeros)

    def add(self, values: Tensor) -> None:
        """Add ``values`` [groups, positions, weights]: products of one batch in float32, which is twice as fast."""
        self.count += values.shape[1]
        self.sums.add_(values.sum(1))
        for start in range(0, values.shape[2], _PRODUCTS):
            rows = slice(start, start + _PRODUCTS)
            self.products[:, rows, start:].add_(values[:, :, rows].mT @ values[:, :, start:])


class HessianCollector:
    """The Hessian of each layer: second moments, about their mean, of what each convolution and linear layer of a
    network reads.

    Within ``with`` every forward pass of the network is looked at.

    Args:
        student: the network.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        self._layers = [
            layer
            for layer in student.modules()
            if isinstance(layer, WeightedLayer) and layer.weight[0].numel() <= _MOST_WEIGHTS
        ]
        self._generator = torch.Generator().manual_seed(0)
        self._moments: dict[nn.Module, _Moments] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> HessianCollector:
        self._hooks = [layer.register_forward_hook(self._look) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim not in (2, 4) or (isinstance(layer, nn.Linear) and output.ndim != 2):
            return  # a linear layer over pixels
        height, width = as_map(output).shape[2:]
        positions = Positions.drawn(len(output), height, width, _POSITIONS, self._generator)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        found = patches(cast(Layer, layer), inputs[0].detach().cpu(), positions)
        values = found.reshape(len(found), groups, -1).transpose(0, 1)  # [groups, M, weights]
        if layer not in self._moments:
            self._moments[layer] = _Moments.none(groups, values.shape[2])
        self._moments[layer].add(values)

    def __len__(self) -> int:
        """Layers that were seen."""
        return len(self._moments)

    def items(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each layer that was seen, and its damped Hessian, float64 [groups, weights of a channel, the same];
        what is above its diagonal counts."""
        for layer, moments in self._moments.items():
            count, mean, squares = moments.count, moments.sums / moments.count, moments.products / moments.count
            hessian = squares - mean[:, :, None] * mean[:, None, :]
            weights = hessian.shape[1]
            damping = (_PERCDAMP + weights / count) * _size(hessian) + weights * _PRECISION * _size(squares)
            yield layer, hessian + torch.diag_embed(damping[:, None].expand(-1, weights))


@torch.no_grad()
def gptq(hessians: HessianCollector) -> None:
    """Round the weights of all layers that ``hessians`` has seen, in place; their scales stay as they are."""
    for layer, hessian in track(hessians.items(), "round weights", len(hessians)):
        _round(cast(Any, layer), hessian)


def _round(layer: Any, hessian: Tensor) -> None:
    quantizer = layer.weight_fake_quant
    groups, size = hessian.shape[:2]
    weight = layer.weight.detach().cpu().double().reshape(groups, -1, size)
    scale = quantizer.exact_scale().cpu().double().view(groups, -1)
    shares = _shares(hessian)
    rounded, errors = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        wanted = weight[:, :, start:stop] + errors[:, :, :start] @ shares[:, :start, start:stop]
        for index in range(start, stop):
            made_up = errors[:, :, start:index] @ shares[:, start:index, index, None]
            column = wanted[:, :, index - start] + made_up[:, :, 0]
            rounded[:, :, index] = (column / scale).round().clamp_(quantizer.quant_min, quantizer.quant_max) * scale
            errors[:, :, index] = weight[:, :, index] - rounded[:, :, index]
    layer.weight.copy_(rounded.view_as(layer.weight))


def _size(hessian: Tensor) -> Tensor:
    """The mean of the diagonal of each group, [groups]; where all is zero, 1."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=0)
    return torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)


def _shares(hessian: Tensor) -> Tensor:
    """Return which share of the error of each weight (row) each one behind it (column) makes up for.

    The result is [groups, weights, weights]; what is above its diagonal counts.

    With U the upper triangular matrix of U U^T = H, it is U with each column divided by its diagonal value.

    Where inputs hardly vary, the errors of float32 outweigh the damping: it grows until the matrix is positive.
    """
    damping = _PERCDAMP * _size(hessian)[:, None].expand(hessian.shape[:2])
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            return cast(Tensor, upper / upper.diagonal(dim1=1, dim2=2)[:, None, :])
        hessian = hessian + torch.diag_embed(damping)
        damping = 4 * damping
