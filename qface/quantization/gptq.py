"""GPTQ of a layer, by statistics of the inputs that it has in the student.

The target is the output of the float network, not of the float layer: the inputs of the student differ from those of
the float network, since earlier layers are rounded. By ridge regression the float weights first make up for as much of
that difference as they can (asymmetric calibration; Li et al., GPTAQ, ICML 2025); then they are rounded.

The weights of the largest inputs are rounded first, as by ``act_order`` in the code of GPTQ. Channels with few weights
have little room for compensation, so more is tried there: several scales per channel, and coordinate descent after
GPTQ. Symmetric integers compete with others (:mod:`qface.quantization.weight_qparams`). What has the smallest output
error is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qface.quantization.fake_quantize import WeightFakeQuantize
from qface.quantization.weight_qparams import WeightQParams, candidate_qparams
from qface.quantization.weight_rounding import ChannelQParams, LowRankProblem, RoundingProblem, cholesky

__all__ = ["Statistics", "statistics_for", "weight_of"]

_VALUES = 2**16  # of sampled patches per layer and image: 2,427 patches of a first layer, 14 of 512 x 3 x 3
_PERCDAMP = 1e-3
"""Hessian damping, as a fraction of mean(diag(H)).

The 1e-2 of GPTQ is too much for the first layer: neighboring pixels are nearly equal, so that most directions of its
input are smaller than that.
"""
_SAMPLE_DAMPING, _LOW_RANK_DAMPING = 0.3, 0.1
"""Further damping of the same kind, times num_weights / num_samples.

With few samples, H misses directions of the inputs, and GPTQ would put large errors there. With far fewer samples than
weights there is room for small errors in all directions that H knows.
"""
_PRECISION = 4 * torch.finfo(torch.float32).eps
"""Relative error of float32 products, per weight.

Subtracting the mean may cancel nearly the whole product, and the errors of all weights may add up in one direction.
"""
_CORRECTED_SHARE = 0.5
"""Share of the least-squares correction that weights take.

A full one also shrinks them, as regression on noisy inputs does: activations are rounded, and the more so the fewer
bits they have.
"""
_PRODUCTS = 1024  # rows of the second moments per matrix product, which skips most of the lower triangle
_MAX_WEIGHTS = 4608
"""Maximum weights per output channel, 512 x 3 x 3, with second moments, which take gigabytes for more."""
_MAX_SAMPLES = 1024  # patches that are kept for a layer with more weights
_SEARCHED_WEIGHTS = 576
"""Maximum weights per output channel for the search of scales by channel, 64 x 3 x 3.

The channels of larger layers take one factor, which suits some of them. It brings most of the gain.
"""
_CHANNELS_OF_FACTOR = 32
_BITS_OF_FACTOR = 3  # with more bits the best factor is 1
_SCALE_FACTORS = torch.linspace(0.6, 1.2, 13).tolist()  # of the scale that rounds to nearest best


class Statistics(Protocol):
    """Statistics of a layer's input patches, and of the errors in its outputs that are to be made up for."""

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch of ``images`` images."""

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Add patches ``inputs`` [groups, M, K] and what is missing in their outputs, ``errors`` [groups, M, channels].

        ``errors`` is what the layer should put out, minus what its float weights make of ``inputs``.
        """

    def round(self, layer: Any, weight: Tensor) -> Tensor:
        """Return the float ``weight`` of ``layer``, float64 [groups, channels, K], rounded."""

    def bias_shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Return the mean of what outputs lack with the ``rounded`` weights, float64 [groups x channels]."""


def statistics_for(groups: int, channels: int, size: int) -> Statistics:
    """Return statistics of no patches for a layer with a weight [groups, channels, size]."""
    kind = _Moments if size <= _MAX_WEIGHTS else _Samples
    return kind.none(groups, channels, size)


def weight_of(layer: Any) -> Tensor:
    """Return the weights of a convolution or linear layer, float64 [groups, channels, K] on the CPU."""
    weight: Tensor = layer.weight.detach().cpu().double()
    return weight.reshape(_groups(layer), len(weight) // _groups(layer), -1)


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


@dataclass
class _Moments:
    """Sums over the input patches of a layer.

    Args:
        count: number of patches.
        sums: sums of inputs, float64 [groups, K] with K weights per output channel.
        products: sums of products of inputs, float64 [groups, K, K]; only the upper triangle is valid.
        error_sums: sums of errors, float64 [groups, channels].
        error_products: sums of products of errors and inputs, float64 [groups, channels, K].
    """

    count: int
    sums: Tensor
    products: Tensor
    error_sums: Tensor
    error_products: Tensor

    @classmethod
    def none(cls, groups: int, channels: int, weights: int) -> _Moments:
        """Return moments of no patches."""
        squares = torch.zeros(groups, weights, weights, dtype=torch.float64)
        products = torch.zeros(groups, channels, weights, dtype=torch.float64)
        return cls(0, squares[:, 0].clone(), squares, products[:, :, 0].clone(), products)

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch."""
        return images * _VALUES // self.sums.numel()

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Add patches; products within a batch are float32, which is twice as fast."""
        self.count += inputs.shape[1]
        self.sums.add_(inputs.sum(1))
        for start in range(0, inputs.shape[2], _PRODUCTS):
            rows = slice(start, start + _PRODUCTS)
            self.products[:, rows, start:].add_(inputs[:, :, rows].mT @ inputs[:, :, start:])
        self.error_sums.add_(errors.sum(1))
        self.error_products.add_(errors.mT @ inputs)

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
        weight = weight + _CORRECTED_SHARE * self._correction(hessian)
        importance = hessian.diagonal(dim1=1, dim2=2)
        order = importance.argsort(dim=1, descending=True, stable=True)
        hessian = _ordered(_ordered(hessian, order).mT, order)
        problem = RoundingProblem(_ordered(weight, order), hessian)
        candidates = _candidates(layer, weight, importance)
        searches = layer.weight_fake_quant.observer == "mse"
        few = weight.shape[2] <= _SEARCHED_WEIGHTS
        if searches and few:
            candidates = [each.times(factor) for each in candidates for factor in _SCALE_FACTORS]
        elif searches and layer.weight_bits <= _BITS_OF_FACTOR:
            candidates = [each.times(_common_factor(layer, problem, each)) for each in candidates]
        return _restored(_best(layer, problem, candidates, descends=searches and few), order)

    def _correction(self, hessian: Tensor) -> Tensor:
        """Return the change of the float weights that makes up for errors, by ridge regression."""
        means = self.error_sums[:, :, None] * self.sums[:, None, :] / self.count**2
        slopes = self.error_products / self.count - means
        size = hessian.shape[1]
        damping = _SAMPLE_DAMPING * size / self.count * _mean(hessian.diagonal(dim1=1, dim2=2))
        return _divided(slopes, hessian + torch.diag_embed(damping[:, None].expand(-1, size)))

    def bias_shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Return the mean of what outputs lack with the ``rounded`` weights, float64 [groups x channels]."""
        products = (weight - rounded) @ self.sums[:, :, None]
        return (self.error_sums + products[:, :, 0]).flatten() / self.count


@dataclass
class _Samples:
    """Input patches of a layer with many weights.

    Args:
        inputs: float32 [groups, N, K].
        errors: float32 [groups, N, channels].
    """

    inputs: Tensor
    errors: Tensor

    @classmethod
    def none(cls, groups: int, channels: int, weights: int) -> _Samples:
        """Return no patches."""
        return cls(torch.empty(groups, 0, weights), torch.empty(groups, 0, channels))

    def wanted(self, images: int) -> int:
        """Return the maximum number of patches to draw from a batch, 0 if there are enough."""
        return 2 * images if self._room else 0

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Add patches, as long as there are few."""
        self.inputs, self.errors = (
            torch.cat([old, new[:, : self._room]], 1) for old, new in ((self.inputs, inputs), (self.errors, errors))
        )

    @property
    def _room(self) -> int:
        return _MAX_SAMPLES - self.inputs.shape[1]

    def round(self, layer: Any, weight: Tensor) -> Tensor:
        """Return ``weight`` [groups, channels, K] rounded."""
        count, size = self.inputs.shape[1:]
        centered = _centered(self.inputs)
        variances = centered.square().mean(1)
        weight = weight + _CORRECTED_SHARE * self._correction(centered, variances)
        order = variances.argsort(dim=1, descending=True, stable=True)
        samples = _ordered(centered, order) / count**0.5
        damping = (_PERCDAMP + _LOW_RANK_DAMPING * size / count) * _mean(variances)
        _set_nearest(layer, weight, _candidates(layer, weight, variances), variances)
        problem = LowRankProblem(_ordered(weight, order), samples, damping)
        return _restored(problem.gptq(_qparams(layer)), order)

    def _correction(self, centered: Tensor, variances: Tensor) -> Tensor:
        """Return the change of the float weights that makes up for errors, by ridge regression in N dimensions."""
        count, size = centered.shape[1:]
        damping = 2 * _SAMPLE_DAMPING * size * _mean(variances)
        kernel = centered @ centered.mT + torch.diag_embed(damping[:, None].expand(-1, count))
        return _divided(_centered(self.errors).mT, kernel) @ centered

    def bias_shift(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Return the mean of what outputs lack with the ``rounded`` weights, float64 [groups x channels]."""
        products = (weight - rounded) @ self.inputs.mean(1, dtype=torch.float64)[:, :, None]
        return (self.errors.mean(1, dtype=torch.float64) + products[:, :, 0]).flatten()


def _centered(samples: Tensor) -> Tensor:
    """Return ``samples`` [groups, N, size] minus their mean, float64."""
    return samples.double() - samples.mean(1, True, dtype=torch.float64)


def _mean(diagonal: Tensor) -> Tensor:
    """Return the mean of a ``diagonal`` [groups, K] per group; 1 for zeros."""
    mean = diagonal.mean(1).clamp(min=0)
    return torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)


def _divided(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows`` [groups, N, K] times the inverse of the positive definite ``matrix`` [groups, K, K]."""
    return torch.cholesky_solve(rows.mT, cholesky(matrix)).mT


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
    shape = (_groups(layer), -1)
    scale, offset = quantizer.exact_scale().cpu().double().view(shape), quantizer.offset.cpu().double().view(shape)
    return ChannelQParams(scale, offset, int(quantizer.stride), quantizer.quant_min, quantizer.quant_max)


def _common_factor(layer: Any, problem: RoundingProblem, candidate: WeightQParams) -> float:
    """Return the factor of all scales of the candidate with the smallest mean loss, relative to a channel's output."""
    channels = problem.weight.shape[1]
    chosen = torch.linspace(0, channels - 1, min(_CHANNELS_OF_FACTOR, channels)).long()
    some = problem.of_channels(chosen)
    exact = [_set(layer, candidate.times(factor)).of_channels(chosen) for factor in _SCALE_FACTORS]
    squares = some.losses(torch.zeros_like(some.weight)).clamp(min=torch.finfo(torch.float32).tiny)
    losses = some.rounded_by_each(exact, descends=False)[1] / squares[:, None]
    factor: float = _SCALE_FACTORS[int(losses.mean((0, 2)).argmin())]
    return factor


def _best(layer: Any, problem: RoundingProblem, candidates: list[WeightQParams], descends: bool) -> Tensor:
    """Give each channel the candidate with the smallest loss; return the weights rounded with it."""
    rounded, losses = problem.rounded_by_each([_set(layer, candidate) for candidate in candidates], descends)
    best = losses.argmin(1)  # [groups, channels]
    _set(layer, _chosen(candidates, best.flatten()))
    return rounded.gather(1, best[:, None, :, None].expand_as(rounded[:, :1]))[:, 0]


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
