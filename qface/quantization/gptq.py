"""GPTQ: weight rounding in which later weights compensate for the errors of earlier ones.

The output error of a layer is error' H error, with H the second moments of its inputs. Weights are rounded one by one;
each is first shifted by its share of the earlier errors (Hassibi and Stork, Optimal Brain Surgeon, 1993; Frantar et
al., GPTQ, ICLR 2023). The shares come from a triangular factor of H, so no inverse is needed (LDLQ; Chee et al., QuIP,
NeurIPS 2023, theorem 6: GPTQ equals LDLQ). The rounded weights are multiples of the given scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qface.models.patches import Layer, Positions, as_map, patches
from qface.quantization.quantized_layers import WeightedLayer

__all__ = ["HessianCollector"]

_POSITIONS = 1024  # sampled positions per layer and batch
_PERCDAMP = 1e-2
"""Hessian damping, as a fraction of mean(diag(H)), plus num_weights / num_samples.

With few samples, H misses directions of the inputs, and GPTQ would put large errors there.
"""
_PRECISION = 4 * torch.finfo(torch.float32).eps
"""Relative error of float32 products, per weight.

Subtracting the mean may cancel nearly the whole product, and the errors of all weights may add up in one direction.
"""
_BLOCK = 128  # weights per block; later weights get a block's errors by one matrix product
_PRODUCTS = 1024  # rows of the second moments per matrix product, which skips most of the lower triangle
_MAX_WEIGHTS = 4608
"""Maximum weights per output channel, 512 x 3 x 3. Larger layers are rounded to nearest: their H takes gigabytes."""


@dataclass
class _Moments:
    """Sums over the input patches of a layer.

    Args:
        count: number of patches.
        sums: sums of values, float64 [groups, K] with K weights per output channel.
        products: sums of products, float64 [groups, K, K]; only the upper triangle is valid.
    """

    count: int
    sums: Tensor
    products: Tensor

    @classmethod
    def none(cls, groups: int, weights: int) -> _Moments:
        """Return moments of no patches."""
        zeros = torch.zeros(groups, weights, weights, dtype=torch.float64)
        return cls(0, zeros[:, 0].clone(), zeros)

    def add(self, values: Tensor) -> None:
        """Add patches ``values`` [groups, M, K]; products within a batch are float32, which is twice as fast."""
        self.count += values.shape[1]
        self.sums.add_(values.sum(1))
        for start in range(0, values.shape[2], _PRODUCTS):
            rows = slice(start, start + _PRODUCTS)
            self.products[:, rows, start:].add_(values[:, :, rows].mT @ values[:, :, start:])

    def hessian(self) -> Tensor:
        """Return the damped Hessian, float64 [groups, K, K], upper triangle valid."""
        mean, squares = self.sums / self.count, self.products / self.count
        hessian = squares - mean[:, :, None] * mean[:, None, :]
        weights = hessian.shape[1]
        damping = (_PERCDAMP + weights / self.count) * _mean_diagonal(hessian)
        damping += weights * _PRECISION * _mean_diagonal(squares)
        return hessian + torch.diag_embed(damping[:, None].expand(-1, weights))


class HessianCollector:
    """Collector of each layer's Hessian: the covariance of its input patches.

    As a context manager, it observes every forward pass of the network. Layers with too many weights, and linear layers
    over the positions of a sequence or map, are left out.

    Args:
        student: a network with quantized convolutions and linear layers.

    Attributes:
        layers: names of the layers that may be observed.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        self._modules = {
            name: layer
            for name, layer in student.named_modules()
            if isinstance(layer, WeightedLayer) and layer.weight[0].numel() <= _MAX_WEIGHTS
        }
        self.layers = list(self._modules)
        self._generator = torch.Generator().manual_seed(0)
        self._moments: dict[str, _Moments] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> HessianCollector:
        self._hooks = [
            layer.register_forward_hook(partial(self._observe, name)) for name, layer in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _observe(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim not in (2, 4) or (isinstance(layer, nn.Linear) and output.ndim != 2):
            return  # a linear layer over the positions of a sequence or map
        height, width = as_map(output).shape[2:]
        positions = Positions.drawn(len(output), height, width, _POSITIONS, self._generator)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        found = patches(cast(Layer, layer), inputs[0].detach().cpu(), positions)
        values = found.reshape(len(found), groups, -1).transpose(0, 1)  # [groups, M, weights]
        if name not in self._moments:
            self._moments[name] = _Moments.none(groups, values.shape[2])
        self._moments[name].add(values)

    @torch.no_grad()
    def round_weights(self, name: str) -> None:
        """Round the weights of a layer in place, and free its Hessian; scales do not change.

        Args:
            name: one of :attr:`layers`. A layer that was never observed keeps its weights.
        """
        moments = self._moments.pop(name, None)
        if moments is not None:
            _round(cast(Any, self._modules[name]), moments.hessian())

    def state(self) -> dict[str, Any]:
        """Return everything observed so far, for :meth:`restore`."""
        moments = {name: vars(each) for name, each in self._moments.items()}
        return {"generator": self._generator.get_state(), "moments": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the ``state`` of another collector for the same network."""
        self._generator.set_state(state["generator"])
        self._moments = {name: _Moments(**each) for name, each in state["moments"].items()}


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
            compensation = errors[:, :, start:index] @ shares[:, start:index, index, None]
            column = wanted[:, :, index - start] + compensation[:, :, 0]
            rounded[:, :, index] = (column / scale).round().clamp_(quantizer.quant_min, quantizer.quant_max) * scale
            errors[:, :, index] = weight[:, :, index] - rounded[:, :, index]
    layer.weight.copy_(rounded.view_as(layer.weight))


def _mean_diagonal(hessian: Tensor) -> Tensor:
    """Return the mean of the diagonal per group, [groups]; 1 for a zero matrix."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=0)
    return torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)


def _shares(hessian: Tensor) -> Tensor:
    """Return the share of each weight's error that later weights compensate, [groups, K, K].

    Rows are the rounded weights, columns the later ones.

    With U upper triangular and U U^T = H, this is U with each column divided by its diagonal element; the upper
    triangle is valid. If float32 errors outweigh the damping, the damping grows until H is positive definite.
    """
    damping = _PERCDAMP * _mean_diagonal(hessian)[:, None].expand(hessian.shape[:2])
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            return cast(Tensor, upper / upper.diagonal(dim1=1, dim2=2)[:, None, :])
        hessian = hessian + torch.diag_embed(damping)
        damping = 4 * damping
