"""Calibration stage that rounds weights: GPTQ with the Hessians of the calibration images.

The weights of the largest inputs are rounded first, as by ``act_order`` in the code of GPTQ. Channels with few weights
have little room for compensation, so more is tried there: several scales per channel, and coordinate descent after
GPTQ. Symmetric integers compete with others (:mod:`qface.quantization.weight_qparams`). What has the smallest output
error is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from qface.models.patches import Layer, Positions, as_map, patches
from qface.quantization.fake_quantize import WeightFakeQuantize
from qface.quantization.quantized_layers import WeightedLayer
from qface.quantization.weight_qparams import WeightQParams, candidate_qparams
from qface.quantization.weight_rounding import ChannelQParams, LowRankProblem, RoundingProblem

__all__ = ["HessianCollector"]

_VALUES = 2**22  # of sampled patches per layer and batch: 155,000 patches of a first layer, 910 of 512 x 3 x 3
_PERCDAMP = 1e-3
"""Hessian damping, as a fraction of mean(diag(H)).

The 1e-2 of GPTQ is too much for the first layer: neighboring pixels are nearly equal, so that most directions of its
input are smaller than that.
"""
_SAMPLE_DAMPING, _LOW_RANK_DAMPING = 1.0, 0.1
"""Further damping of the same kind, times num_weights / num_samples.

With few samples, H misses directions of the inputs, and GPTQ would put large errors there. With far fewer samples than
weights there is room for small errors in all directions that H knows.
"""
_PRECISION = 4 * torch.finfo(torch.float32).eps
"""Relative error of float32 products, per weight.

Subtracting the mean may cancel nearly the whole product, and the errors of all weights may add up in one direction.
"""
_PRODUCTS = 1024  # rows of the second moments per matrix product, which skips most of the lower triangle
_MAX_WEIGHTS = 4608
"""Maximum weights per output channel, 512 x 3 x 3, with second moments, which take gigabytes for more."""
_MAX_SAMPLES = 1024  # patches that are kept for a layer with more weights
_SEARCHED_WEIGHTS = 576
"""Maximum weights per output channel for the search of scales, 64 x 3 x 3; larger channels gain 3 % of their loss."""
_SCALE_FACTORS = torch.linspace(0.6, 1.2, 13).tolist()  # of the scale that rounds to nearest best


class _Statistics(Protocol):
    """Statistics of a layer's inputs, by which its weights are rounded."""

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch of ``images`` images."""

    def add(self, values: Tensor) -> None:
        """Add patches ``values`` [groups, M, K]."""

    def round(self, layer: Any, weight: Tensor) -> Tensor:
        """Return ``weight`` of ``layer``, float64 [groups, channels, K], rounded."""


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

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch."""
        return _VALUES // self.sums.numel()

    def add(self, values: Tensor) -> None:
        """Add patches ``values`` [groups, M, K]; products within a batch are float32, which is twice as fast."""
        self.count += values.shape[1]
        self.sums.add_(values.sum(1))
        for start in range(0, values.shape[2], _PRODUCTS):
            rows = slice(start, start + _PRODUCTS)
            self.products[:, rows, start:].add_(values[:, :, rows].mT @ values[:, :, start:])

    def hessian(self) -> Tensor:
        """Return the damped Hessian, float64 [groups, K, K]."""
        mean, squares = self.sums / self.count, self.products / self.count
        upper = squares - mean[:, :, None] * mean[:, None, :]
        size = upper.shape[1]
        damping = (_PERCDAMP + _SAMPLE_DAMPING * size / self.count) * _mean(upper.diagonal(dim1=1, dim2=2))
        damping += size * _PRECISION * _mean(squares.diagonal(dim1=1, dim2=2))
        return upper.triu() + upper.triu(1).mT + torch.diag_embed(damping[:, None].expand(-1, size))

    def round(self, layer: Any, weight: Tensor) -> Tensor:
        """Return ``weight`` [groups, channels, K] rounded; the layer gets the parameters of least loss."""
        hessian = self.hessian()
        importance = hessian.diagonal(dim1=1, dim2=2)
        order = importance.argsort(dim=1, descending=True, stable=True)
        hessian = _ordered(_ordered(hessian, order).mT, order)
        problem = RoundingProblem(_ordered(weight, order), hessian)
        candidates = _candidates(layer, weight, importance)
        if weight.shape[2] <= _SEARCHED_WEIGHTS and layer.weight_fake_quant.observer == "mse":
            scaled = [replace(each, scale=each.scale * factor) for each in candidates for factor in _SCALE_FACTORS]
            rounded = _best(layer, problem, scaled, descends=True)
        else:
            rounded = _best(layer, problem, candidates, descends=False)
        return _restored(rounded, order)


@dataclass
class _Samples:
    """Input patches of a layer with many weights.

    Args:
        patches: float32 [groups, N, K].
    """

    patches: Tensor

    @classmethod
    def none(cls, groups: int, weights: int) -> _Samples:
        """Return no patches."""
        return cls(torch.empty(groups, 0, weights))

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch, 0 if there are enough."""
        return 2 * images if self._room else 0

    def add(self, values: Tensor) -> None:
        """Add patches ``values`` [groups, M, K], as long as there are few."""
        self.patches = torch.cat([self.patches, values[:, : self._room]], 1)

    @property
    def _room(self) -> int:
        return _MAX_SAMPLES - self.patches.shape[1]

    def round(self, layer: Any, weight: Tensor) -> Tensor:
        """Return ``weight`` [groups, channels, K] rounded."""
        count, size = self.patches.shape[1:]
        centered = self.patches.double() - self.patches.mean(1, True, dtype=torch.float64)
        variances = centered.square().mean(1)
        order = variances.argsort(dim=1, descending=True, stable=True)
        samples = _ordered(centered, order) / count**0.5
        damping = (_PERCDAMP + _LOW_RANK_DAMPING * size / count) * _mean(variances)
        _set_nearest(layer, weight, _candidates(layer, weight, variances), variances)
        problem = LowRankProblem(_ordered(weight, order), samples, damping)
        return _restored(problem.gptq(_qparams(layer)), order)


class HessianCollector:
    """Collector of what GPTQ needs to know about the input patches of each layer.

    As a context manager, it observes every forward pass of the network. Linear layers over the positions of a sequence
    or map are left out.

    Args:
        student: a network with quantized convolutions and linear layers.

    Attributes:
        layers: names of the layers that may be observed.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        self._modules = {name: layer for name, layer in student.named_modules() if isinstance(layer, WeightedLayer)}
        self.layers = list(self._modules)
        self._generator = torch.Generator().manual_seed(0)
        self._statistics: dict[str, _Statistics] = {}
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
        groups, size = _shape(layer)
        if name not in self._statistics:
            self._statistics[name] = self._kind(name).none(groups, size)
        statistics, (height, width) = self._statistics[name], as_map(output).shape[2:]
        wanted = statistics.wanted(len(output))
        positions = Positions.drawn(len(output), height, width, wanted, self._generator)
        if wanted:
            found = patches(cast(Layer, layer), inputs[0].detach().cpu(), positions)
            statistics.add(found.view(-1, groups, size).transpose(0, 1))

    def _kind(self, name: str) -> type[_Moments | _Samples]:
        return _Moments if _shape(self._modules[name])[1] <= _MAX_WEIGHTS else _Samples

    @torch.no_grad()
    def round_weights(self, name: str) -> None:
        """Round the weights of a layer in place, and free its statistics.

        Where the weight observer is ``"mse"``, offsets change too in layers of at most 6 bits, and scales in those and
        in layers of at most 576 weights per channel.

        Args:
            name: one of :attr:`layers`. A layer that was never observed keeps its weights.
        """
        statistics, layer = self._statistics.pop(name, None), self._modules[name]
        if statistics is not None:
            groups, size = _shape(layer)
            weight = layer.weight.detach().cpu().double().reshape(groups, -1, size)
            layer.weight.copy_(statistics.round(layer, weight).view_as(layer.weight))

    def state(self) -> dict[str, Any]:
        """Return everything observed so far, for :meth:`restore`."""
        statistics = {name: vars(each) for name, each in self._statistics.items()}
        return {"generator": self._generator.get_state(), "statistics": statistics}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the ``state`` of another collector for the same network."""
        self._generator.set_state(state["generator"])
        self._statistics = {name: self._kind(name)(**each) for name, each in state["statistics"].items()}


def _shape(layer: Any) -> tuple[int, int]:
    """Return the number of groups and of weights per output channel."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1, layer.weight[0].numel()


def _mean(diagonal: Tensor) -> Tensor:
    """Return the mean of a ``diagonal`` [groups, K] per group; 1 for zeros."""
    mean = diagonal.mean(1).clamp(min=0)
    return torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    """Return each row of ``rows`` [groups, N, K] in ``order`` [groups, K]."""
    return rows.gather(2, order[:, None].expand_as(rows))


def _restored(rows: Tensor, order: Tensor) -> Tensor:
    """Undo :func:`_ordered`."""
    return torch.empty_like(rows).scatter_(2, order[:, None].expand_as(rows), rows)


def _candidates(layer: Any, weight: Tensor, importance: Tensor) -> list[WeightQParams]:
    """Return the parameters worth trying for ``weight`` [groups, channels, K]; ``importance`` is [groups, K]."""
    rows = weight.flatten(0, 1)
    return candidate_qparams(layer.weight_fake_quant, rows, importance.repeat_interleave(weight.shape[1], 0))


def _set(layer: Any, qparams: WeightQParams) -> ChannelQParams:
    """Set the parameters of a layer's weights, with scales that fit its bias; return the exact ones."""
    quantizer: WeightFakeQuantize = layer.weight_fake_quant
    minimum = layer.minimum_weight_scale()
    scale = torch.maximum(qparams.scale.to(minimum), minimum)
    quantizer.set_weight_qparams(scale, qparams.offset.to(minimum.device), qparams.stride)
    return _qparams(layer)


def _qparams(layer: Any) -> ChannelQParams:
    """Return the exact parameters of a layer's weights."""
    quantizer: WeightFakeQuantize = layer.weight_fake_quant
    shape = (_shape(layer)[0], -1)
    scale, offset = quantizer.exact_scale().cpu().double().view(shape), quantizer.offset.cpu().double().view(shape)
    return ChannelQParams(scale, offset, int(quantizer.stride), quantizer.quant_min, quantizer.quant_max)


def _best(layer: Any, problem: RoundingProblem, candidates: list[WeightQParams], descends: bool) -> Tensor:
    """Give each channel the candidate with the smallest loss; return the weights rounded with it.

    All candidates are tried at once, as if each were a channel.
    """
    groups, channels, _ = problem.weight.shape
    exact = [_set(layer, candidate) for candidate in candidates]
    together = problem.repeated(len(candidates))
    qparams = replace(
        exact[0],
        scale=torch.cat([each.scale for each in exact], 1),
        offset=torch.cat([each.offset for each in exact], 1),
    )
    rounded = together.gptq(qparams)
    if descends:
        rounded = together.descend(rounded, qparams)
    best = together.losses(rounded).view(groups, -1, channels).argmin(1)  # [groups, channels]
    _set(layer, _chosen(candidates, best.flatten()))
    channel = best * channels + torch.arange(channels)
    return rounded.gather(1, channel[..., None].expand_as(problem.weight))


def _set_nearest(layer: Any, weight: Tensor, candidates: list[WeightQParams], importance: Tensor) -> None:
    """Give each channel the candidate that rounds ``weight`` to nearest best."""
    squares = [(_set(layer, each).round_all(weight) - weight).square() for each in candidates]
    errors = torch.stack([(each * importance[:, None]).sum(2) for each in squares])
    _set(layer, _chosen(candidates, errors.argmin(0).flatten()))


def _chosen(candidates: list[WeightQParams], best: Tensor) -> WeightQParams:
    """Return the parameters of ``candidates[best[channel]]`` for each channel of all groups; all have one stride."""
    channel = torch.arange(len(best))
    scale, offset = torch.stack([each.scale for each in candidates]), torch.stack([each.offset for each in candidates])
    return replace(candidates[0], scale=scale[best, channel], offset=offset[best, channel])
