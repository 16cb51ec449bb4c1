"""Quantized training with learned scales (LSQ, Esser et al., ICLR 2020), with gradients of our own.

torch's fake-quant and PReLU kernels handle one value at a time: on a CPU they take ten times as long as the few
vectorized passes that the same forward and backward are made of here. Rounding is straight through inside the range.

All functions here are homogeneous, ``y(x, s) = s f(x / s)``, so that the scale's gradient needs no pass of its own: the
derivative of y by s is ``(y - x dy/dx) / s``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qface.graph.layers import along_channels

__all__ = ["lsq_fake_quantize", "lsq_fake_quantize_prelu", "prelu"]

# Their one-pass kernels, which have no name in torch's interface: the gradient where low < x < high, and where x > low.
_between = torch.ops.aten.hardtanh_backward
_above = torch.ops.aten.threshold_backward


def lsq_fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float) -> Tensor:
    """``x`` rounded to multiples of ``scale``, in its own shape; the gradient passes half a step beyond both bounds.

    Args:
        x: any shape, float32.
        scale: [1], or one for each slice of dimension 0, [C, 1, ...].
        quant_min: least integer, counted from the zero point.
        quant_max: greatest integer, likewise.
        grad_factor: what the gradient of ``scale`` is multiplied with.
    """
    found = _LSQFakeQuantize.apply(x, scale, quant_min, quant_max, grad_factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def lsq_fake_quantize_prelu(
    x: Tensor,
    slopes: Tensor,
    scale: Tensor,
    input_quant_min: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> Tensor:
    """The PReLU of ``x``, rounded before it and behind it, as two :func:`lsq_fake_quantize` with a PReLU in between.

    Only the gradient of the slopes differs: it is taken of ``x`` as it was before rounding, where nothing clips it.

    Args:
        x: [N, C, ...], float32.
        slopes: [C] or [1].
        scale: [1], of both roundings.
        input_quant_min: least integer of what the PReLU reads, counted from the zero point.
        quant_min: least integer of what it makes, likewise.
        quant_max: greatest integer of both, likewise.
        grad_factor: what the gradient of ``scale`` is multiplied with.
    """
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the slopes, and so the results, were others
        found = _LSQFakeQuantizePReLU.apply(  # type: ignore[no-untyped-call]
            x, slopes, scale, input_quant_min, quant_min, quant_max, grad_factor
        )
    return cast(Tensor, found)


def prelu(x: Tensor, slopes: Tensor) -> Tensor:
    """``torch.prelu`` of ``x`` [N, C, ...] with ``slopes`` [C] or [1]."""
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _PReLU.apply(x, slopes))  # type: ignore[no-untyped-call]


class _LSQFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float) -> Tensor:
        steps = x / scale
        rounded = steps.round().clamp_(quant_min, quant_max).mul_(scale)
        ctx.save_for_backward(steps, rounded, scale)
        ctx.quant_min, ctx.quant_max, ctx.grad_factor = quant_min, quant_max, grad_factor
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, rounded, scale = ctx.saved_tensors
        passed = _between(gradient, steps, ctx.quant_min - 0.5, ctx.quant_max + 0.5)
        return passed, ctx.grad_factor * _scale_gradient(gradient, rounded, passed, steps, scale), None, None, None


class _LSQFakeQuantizePReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slopes: Tensor,
        scale: Tensor,
        input_quant_min: int,
        quant_min: int,
        quant_max: int,
        grad_factor: float,
    ) -> Tensor:
        steps = x / scale
        read = steps.round().clamp_(input_quant_min, quant_max)
        made = torch.prelu(read, slopes).round_().clamp_(quant_min, quant_max).mul_(scale)
        ctx.save_for_backward(steps, slopes, made, scale)
        ctx.input_quant_min, ctx.quant_min, ctx.quant_max = input_quant_min, quant_min, quant_max
        ctx.grad_factor = grad_factor
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, slopes, made, scale = ctx.saved_tensors
        positive = _between(gradient, steps, 0.0, ctx.quant_max + 0.5)
        # The least input that is not clipped differs by channel: divided by it, all end at -1.
        least = along_channels(_least_input(slopes, ctx.input_quant_min, ctx.quant_min, ctx.quant_max), steps)
        negative = _between(gradient, steps / -least, -1.0, torch.finfo(steps.dtype).tiny)
        passed = positive.addcmul_(negative, along_channels(slopes, steps))
        of_slopes = scale * _sum_to(negative.mul_(steps), slopes)
        of_scale = ctx.grad_factor * _scale_gradient(gradient, made, passed, steps, scale)
        return passed, of_slopes, of_scale, None, None, None, None


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(x, slopes)
        return torch.prelu(x, slopes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        x, slopes = ctx.saved_tensors
        passed = torch.lerp(_above(gradient, x, 0.0), gradient, along_channels(slopes, x))
        return passed, _sum_to(x.clamp(max=0).mul_(gradient), slopes)


def _scale_gradient(gradient: Tensor, made: Tensor, passed: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the scale; ``steps`` is what was read, in steps, and ``passed`` the gradient of it."""
    return _dot(gradient, made, scale) / scale - _dot(passed, steps, scale)


def _dot(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The sum of products, for each scale."""
    if scale.numel() == 1:
        return torch.dot(_flat(a, like=a), _flat(b, like=a))
    return (a * b).flatten(1).sum(1).view_as(scale)


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The values of ``x`` in the order in which ``like`` keeps its own, which for ``like`` itself needs no copy."""
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (x.movedim(1, -1) if channels_last else x).flatten()


def _least_input(slopes: Tensor, input_quant_min: int, quant_min: int, quant_max: int) -> Tensor:
    """The end of the range of what a PReLU reads, in steps, below which it is clipped before or behind it; [slopes]."""
    end = torch.where(slopes > 0, quant_min - 0.5, quant_max + 0.5)
    return torch.where(slopes == 0, -torch.inf, end / slopes).clamp(min=input_quant_min - 0.5)


def _sum_to(values: Tensor, slopes: Tensor) -> Tensor:
    """The sum of ``values`` [N, C, ...] for each channel, or for all where they share one slope."""
    if slopes.numel() == 1:
        return values.sum().view_as(slopes)
    return values.sum([dimension for dimension in range(values.ndim) if dimension != 1])
