"""GPTQ: weights are rounded one by one, and later weights compensate for the errors of earlier ones.

The output error of a layer is error' H error, with the Hessian H, the second moments of the layer's inputs. Each weight
is first shifted by its share of the earlier errors (Hassibi and Stork, Optimal Brain Surgeon, 1993; Frantar et al.,
GPTQ, ICLR 2023). The shares come from a triangular factor of H, so no inverse is needed (LDLQ; Chee et al., QuIP,
NeurIPS 2023, theorem 6: GPTQ equals LDLQ).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from qface.errors import QFaceError
from qface.quantization.kernels import quantize_strided

__all__ = ["ChannelQParams", "LowRankProblem", "RoundingProblem", "cholesky"]

_BLOCK = 128  # weights per block; later weights get a block's errors by one matrix product
_LOW_RANK_BLOCK = 512  # weights per Hessian of a low-rank problem
_SWEEPS = 4  # of coordinate descent; few weights still change in the last one
_RETRIED_DAMPING = 1e-3  # of mean(diag(H)), where float32 errors outweigh the damping that H has


@dataclass(frozen=True)
class ChannelQParams:
    """Quantization parameters of channels, whose weights are ``scale * (stride * q + offset)`` for integers q.

    Args:
        scale: float64 [groups, channels].
        offset: float64 [groups, channels].
        stride: 1 or 2.
        quant_min: minimum q.
        quant_max: maximum q.
    """

    scale: Tensor
    offset: Tensor
    stride: int
    quant_min: int
    quant_max: int

    def round(self, values: Tensor) -> Tensor:
        """Round ``values`` [groups, channels] to nearest."""
        return self._round(values, self.scale, self.offset)

    def round_all(self, weight: Tensor) -> Tensor:
        """Round ``weight`` [groups, channels, K] to nearest."""
        return self._round(weight, self.scale[..., None], self.offset[..., None])

    def of_channels(self, chosen: Tensor) -> ChannelQParams:
        """Return the parameters of some channels of each group."""
        return replace(self, scale=self.scale[:, chosen], offset=self.offset[:, chosen])

    def _round(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return quantize_strided(values, scale, offset, self.stride, self.quant_min, self.quant_max).mul_(scale)


@dataclass(frozen=True)
class RoundingProblem:
    """Weights to round, and the metric of their errors. Weights are rounded in the order in which they stand.

    Args:
        weight: float64 [groups, channels, K].
        hessian: float64 [groups, K, K], positive definite.
    """

    weight: Tensor
    hessian: Tensor

    def of_channels(self, chosen: Tensor) -> RoundingProblem:
        """Return the problem of some channels of each group."""
        return replace(self, weight=self.weight[:, chosen])

    def rounded_by_each(self, qparams: Sequence[ChannelQParams], descends: bool) -> tuple[Tensor, Tensor]:
        """Round the weights by GPTQ once for each of ``qparams``, all at once, as if each had channels of its own.

        Args:
            qparams: T parameters of all channels.
            descends: True for coordinate descent afterwards.

        Returns:
            The rounded weights, [groups, T, channels, K], and their losses, [groups, T, channels].
        """
        groups, channels, size = self.weight.shape
        together = replace(self, weight=self.weight.repeat(1, len(qparams), 1))
        joined = replace(
            qparams[0],
            scale=torch.cat([each.scale for each in qparams], 1),
            offset=torch.cat([each.offset for each in qparams], 1),
        )
        rounded = together.gptq(joined)
        if descends:
            rounded = together.descend(rounded, joined)
        return rounded.view(groups, -1, channels, size), together.losses(rounded).view(groups, -1, channels)

    def losses(self, rounded: Tensor) -> Tensor:
        """Return the mean squared output error of each channel of ``rounded``, [groups, channels]."""
        errors = rounded - self.weight
        return ((errors @ self.hessian) * errors).sum(2)

    def gptq(self, qparams: ChannelQParams) -> Tensor:
        """Return the weights rounded by GPTQ, float64 [groups, channels, K]."""
        shares = _shares(self.hessian)
        rounded, errors = torch.empty_like(self.weight), torch.empty_like(self.weight)
        for start, stop in _blocks(self.weight, _BLOCK):
            wanted = self.weight[:, :, start:stop] + errors[:, :, :start] @ shares[:, :start, start:stop]
            for index in range(start, stop):
                compensation = errors[:, :, start:index] @ shares[:, start:index, index, None]
                rounded[:, :, index] = qparams.round(wanted[:, :, index - start] + compensation[:, :, 0])
                errors[:, :, index] = self.weight[:, :, index] - rounded[:, :, index]
        return rounded

    def descend(self, rounded: Tensor, qparams: ChannelQParams) -> Tensor:
        """Return ``rounded`` after coordinate descent: each weight is rounded again, given all others.

        The losses do not rise (Behdin et al., QuantEase, 2023).
        """
        rounded = rounded.clone()
        for _ in range(_SWEEPS):
            before = rounded.clone()
            for start, stop in _blocks(self.weight, _BLOCK):
                self._descend_block(rounded, qparams, start, stop)
            if torch.equal(rounded, before):
                break
        return rounded

    def _descend_block(self, rounded: Tensor, qparams: ChannelQParams, start: int, stop: int) -> None:
        hessian = self.hessian[:, start:stop, start:stop]
        slopes = (rounded - self.weight) @ self.hessian[:, :, start:stop]  # half the gradient of the losses
        for index in range(stop - start):
            old = rounded[:, :, start + index].clone()
            new = qparams.round(old - slopes[:, :, index] / hessian[:, index, index, None])
            slopes.add_((new - old)[:, :, None] * hessian[:, index, None])
            rounded[:, :, start + index] = new


@dataclass(frozen=True)
class LowRankProblem:
    """Weights to round by few samples: the Hessian is samples' samples + damping x identity, and is never formed.

    Args:
        weight: float64 [groups, channels, K].
        samples: centered inputs divided by the square root of their number, float64 [groups, N, K] with N below K.
        damping: float64 [groups], above 0.
    """

    weight: Tensor
    samples: Tensor
    damping: Tensor

    def gptq(self, qparams: ChannelQParams) -> Tensor:
        """Return the weights rounded by GPTQ, float64 [groups, channels, K].

        For each block, the weights after it are eliminated: as they can still compensate for its errors, the block's
        own metric is what is left of the Hessian (its Schur complement), by the matrix inversion lemma in N dimensions.
        """
        samples, damping = self.samples, self.damping[:, None, None]
        identity = torch.eye(samples.shape[1], dtype=samples.dtype)
        later = samples @ samples.mT + damping * identity  # of the samples' later weights
        rounded = torch.empty_like(self.weight)
        output_errors = self.weight.new_zeros(*self.weight.shape[:2], samples.shape[1])
        for start, stop in _blocks(self.weight, _LOW_RANK_BLOCK):
            block = samples[:, :, start:stop]
            later = later - block @ block.mT
            left = torch.cholesky_solve(damping * block, torch.linalg.cholesky(later))
            hessian = block.mT @ left + damping * torch.eye(stop - start, dtype=samples.dtype)
            compensation = torch.linalg.solve(hessian, (output_errors @ left).mT).mT
            weight = self.weight[:, :, start:stop]
            rounded[:, :, start:stop] = RoundingProblem(weight - compensation, hessian).gptq(qparams)
            output_errors = output_errors + (rounded[:, :, start:stop] - weight) @ block.mT
        return rounded


def _blocks(weight: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Yield both ends of each block of ``size`` weights per channel."""
    count = weight.shape[2]
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _shares(hessian: Tensor) -> Tensor:
    """Return the share of each weight's error that later weights compensate, [groups, K, K].

    Rows are the rounded weights, columns the later ones.

    With U upper triangular and U U^T = H, this is U with each column divided by its diagonal element; the upper
    triangle is valid.
    """
    upper = cholesky(hessian.flip(1, 2)).flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2)[:, None, :]


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of ``matrix`` [groups, K, K].

    Where float32 errors outweigh the damping that a group has, this grows until the group is positive definite.

    Raises:
        QFaceError: a value is NaN or infinite.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    damping = _RETRIED_DAMPING * diagonal.abs().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any():
            return cast(Tensor, lower)
        if not matrix.isfinite().all():
            raise QFaceError("the inputs of a layer are too large for float32: check the weights of the network")
        matrix = matrix + torch.diag_embed(torch.where(failed > 0, damping, 0.0)[:, None].expand_as(diagonal))
        damping = 4 * damping
