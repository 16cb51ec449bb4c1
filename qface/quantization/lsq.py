"""LSQ fake quantization (Esser et al., ICLR 2020) and PReLU with hand-written gradients.

On a CPU, torch's fake-quantize and PReLU kernels take ten times as long as the few vectorized passes used here, since
they handle one value at a time. Rounding uses the straight-through estimator inside the range.

Bounds are integers relative to the zero point. They are tensors [C] where each channel has its own zero point.

All functions here are homogeneous, ``y(x, s) = s f(x / s)``. By Euler's theorem the gradient of y with respect to the
scale s is ``(y - x dy/dx) / s``, which needs no pass of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qface.graph.layers import along_channels
from qface.quantization.kernels import in_memory_order

__all__ = ["Bound", "lsq_fake_quantize", "lsq_fake_quantize_prelu", "prelu"]

Bound = int | Tensor
"""A minimum or maximum integer minus the zero point; [C] if each channel has its own zero point."""

# One-pass masking kernels without a public name in torch: they pass the gradient where low < x < high, or x > low.
_between = torch.ops.aten.hardtanh_backward
_above = torch.ops.aten.threshold_backward


def lsq_fake_quantize(x: Tensor, scale: Tensor, quant_min: Bound, quant_max: Bound, grad_factor: float) -> Tensor:
    """Fake-quantize ``x``; the gradient passes up to half a step outside the range.

    Args:
        x: any shape, float32.
        scale: [1], or [C, 1, ...] with one value per slice of dimension 0.
        quant_min: minimum integer minus the zero point; [C] for the channels in dimension 1.
        quant_max: maximum integer minus the zero point, likewise.
        grad_factor: factor of the gradient of ``scale``.
    """
    found = _LSQFakeQuantize.apply(x, scale, quant_min, quant_max, grad_factor)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def lsq_fake_quantize_prelu(
    x: Tensor,
    slopes: Tensor,
    scale: Tensor,
    input_quant_min: Bound,
    quant_min: Bound,
    quant_max: Bound,
    grad_factor: float,
) -> Tensor:
    """Fake-quantize ``x``, apply PReLU, and fake-quantize the result, in one fused pass.

    The result and gradients equal two :func:`lsq_fake_quantize` with a PReLU in between, except the gradient of the
    slopes: it uses ``x`` before rounding, where nothing clips it.

    Args:
        x: [N, C, ...], float32.
        slopes: [C] or [1].
        scale: [1], shared by input and output.
        input_quant_min: minimum integer of the PReLU's input, minus the zero point; [C] if that is per channel.
        quant_min: minimum integer of the PReLU's output, likewise.
        quant_max: maximum integer of both, likewise.
        grad_factor: factor of the gradient of ``scale``.
    """
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would change the slopes and so the results
        found = _LSQFakeQuantizePReLU.apply(  # type: ignore[no-untyped-call]
            x, slopes, scale, input_quant_min, quant_min, quant_max, grad_factor
        )
    return cast(Tensor, found)


def prelu(x: Tensor, slopes: Tensor) -> Tensor:
    """Compute ``torch.prelu`` with a faster backward.

    Args:
        x: [N, C, ...].
        slopes: [C] or [1].
    """
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _PReLU.apply(x, slopes))  # type: ignore[no-untyped-call]


class _LSQFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: Bound, quant_max: Bound, grad_factor: float) -> Tensor:
        steps = x / scale
        rounded = _clamp_(steps.round(), quant_min, quant_max).mul_(scale)
        ctx.save_for_backward(steps, rounded, scale)
        ctx.quant_min, ctx.quant_max, ctx.grad_factor = quant_min, quant_max, grad_factor
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, rounded, scale = ctx.saved_tensors
        passed = _passed(gradient, steps, ctx.quant_min - 0.5, ctx.quant_max + 0.5)
        return passed, ctx.grad_factor * _scale_gradient(gradient, rounded, passed, steps, scale), None, None, None


class _LSQFakeQuantizePReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slopes: Tensor,
        scale: Tensor,
        input_quant_min: Bound,
        quant_min: Bound,
        quant_max: Bound,
        grad_factor: float,
    ) -> Tensor:
        steps = x / scale
        read = _clamp_(steps.round(), input_quant_min, quant_max)
        output = _clamp_(torch.prelu(read, slopes).round_(), quant_min, quant_max).mul_(scale)
        ctx.save_for_backward(steps, slopes, output, scale)
        ctx.input_quant_min, ctx.quant_min, ctx.quant_max = input_quant_min, quant_min, quant_max
        ctx.grad_factor = grad_factor
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, slopes, output, scale = ctx.saved_tensors
        # The clipping bounds differ by channel; dividing by their magnitude maps all of them to 1 and -1.
        upper = ctx.quant_max + 0.5
        if isinstance(upper, Tensor):
            positive = _between(gradient, steps / along_channels(upper, steps), 0.0, 1.0)
        else:
            positive = _between(gradient, steps, 0.0, upper)
        lower = along_channels(_lower_input_bound(slopes, ctx.input_quant_min, ctx.quant_min, ctx.quant_max), steps)
        negative = _between(gradient, steps / -lower, -1.0, torch.finfo(steps.dtype).tiny)
        passed = positive.addcmul_(negative, along_channels(slopes, steps))
        of_slopes = scale * _sum_to(negative.mul_(steps), slopes)
        of_scale = ctx.grad_factor * _scale_gradient(gradient, output, passed, steps, scale)
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


def _clamp_(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp ``x`` in place."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return x.clamp_(along_channels(low, x), along_channels(high, x))
    return x.clamp_(cast(int, low), cast(int, high))


def _passed(gradient: Tensor, steps: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return ``gradient`` where low < steps < high, and zero elsewhere."""
    if not isinstance(high, Tensor):
        return cast(Tensor, _between(gradient, steps, low, high))
    # Comparisons with bounds per channel take five times as long as mapping all channels to one range.
    middle, half = along_channels((high + low) / 2, steps), along_channels((high - low) / 2, steps)
    return cast(Tensor, _between(gradient, torch.addcmul(-middle / half, steps, 1 / half), -1.0, 1.0))


def _scale_gradient(gradient: Tensor, output: Tensor, passed: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """Return the scale's gradient; ``steps`` is the input / scale, and ``passed`` the input's gradient."""
    return _dot(gradient, output, scale) / scale - _dot(passed, steps, scale)


def _dot(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Return the sum of products per scale."""
    if scale.numel() == 1:
        return torch.dot(*(in_memory_order(each, like=a).flatten() for each in (a, b)))
    return (a * b).flatten(1).sum(1).view_as(scale)


def _lower_input_bound(slopes: Tensor, input_quant_min: Bound, quant_min: Bound, quant_max: Bound) -> Tensor:
    """Return the lower bound of a PReLU's unclipped input in steps, [C] or [1]; its output may clip first."""
    end = torch.where(slopes > 0, quant_min - 0.5, quant_max + 0.5)
    return torch.where(slopes == 0, -torch.inf, end / slopes).clamp(min=input_quant_min - 0.5)


def _sum_to(values: Tensor, slopes: Tensor) -> Tensor:
    """Sum ``values`` [N, C, ...] per channel, or over all channels if they share one slope."""
    if slopes.numel() == 1:
        return values.sum().view_as(slopes)
    return values.sum([dimension for dimension in range(values.ndim) if dimension != 1])
