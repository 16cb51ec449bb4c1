"""What training computes on grids whose step learns (LSQ, Esser et al., ICLR 2020), with gradients of our own.

torch's fake-quant and PReLU kernels handle one value at a time: on a CPU they take ten times as long as the few
vectorised passes that the same forward and backward are made of here. Rounding is straight through inside the range.

All functions here are homogeneous, ``y(x, s) = s f(x / s)``, so that the step's gradient needs no pass of its own: the
derivative of y by s is ``(y - x dy/dx) / s``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qface.models.layers import along_channels

__all__ = ["Levels", "prelu", "prelu_on_grid", "round_to_grid"]

# Their one-pass kernels, which have no name in torch's interface: the gradient where low < x < high, and where x > low.
_between = torch.ops.aten.hardtanh_backward
_above = torch.ops.aten.threshold_backward


class Levels(NamedTuple):
    """The integers of a grid, counted from its zero point; the range reaches half a step beyond them."""

    low: int
    high: int


def round_to_grid(x: Tensor, step: Tensor, levels: Levels, factor: float) -> Tensor:
    """``x`` rounded to multiples of ``step``, in its own shape.

    Args:
        x: any shape, float32.
        step: [1], or one for each slice of dimension 0, [C, 1, ...].
        levels: the least and the greatest multiple.
        factor: what the gradient of ``step`` is multiplied with.
    """
    return cast(Tensor, _RoundToGrid.apply(x, step, levels, factor))  # type: ignore[no-untyped-call]


def prelu_on_grid(x: Tensor, slopes: Tensor, step: Tensor, before: Levels, behind: Levels, factor: float) -> Tensor:
    """The PReLU of ``x``, rounded before it and behind it, as two :func:`round_to_grid` with a PReLU in between.

    Only the gradient of the slopes differs: it is taken of ``x`` as it was before rounding, where nothing clips it.

    Args:
        x: [N, C, ...], float32.
        slopes: [C] or [1].
        step: [1], of both roundings.
        before: levels of what the PReLU reads; the greatest is that of ``behind``.
        behind: levels of what it makes.
        factor: what the gradient of ``step`` is multiplied with.
    """
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the slopes, and so the results, were others
        return cast(Tensor, _PReLUOnGrid.apply(x, slopes, step, before, behind, factor))  # type: ignore[no-untyped-call]


def prelu(x: Tensor, slopes: Tensor) -> Tensor:
    """``torch.prelu`` of ``x`` [N, C, ...] with ``slopes`` [C] or [1]."""
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _PReLU.apply(x, slopes))  # type: ignore[no-untyped-call]


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, levels: Levels, factor: float) -> Tensor:
        steps = x / step
        rounded = steps.round().clamp_(*levels).mul_(step)
        ctx.save_for_backward(steps, rounded, step)
        ctx.levels, ctx.factor = levels, factor
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, rounded, step = ctx.saved_tensors
        passed = _between(gradient, steps, ctx.levels.low - 0.5, ctx.levels.high + 0.5)
        return passed, ctx.factor * _of_step(gradient, rounded, passed, steps, step), None, None


class _PReLUOnGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slopes: Tensor, step: Tensor, before: Levels, behind: Levels, factor: float
    ) -> Tensor:
        steps = x / step
        made = torch.prelu(steps.round().clamp_(*before), slopes).round_().clamp_(*behind).mul_(step)
        ctx.save_for_backward(steps, slopes, made, step)
        ctx.before, ctx.behind, ctx.factor = before, behind, factor
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, slopes, made, step = ctx.saved_tensors
        positive = _between(gradient, steps, 0.0, ctx.behind.high + 0.5)
        # The least input that is not clipped differs by channel: divided by it, all end at -1.
        least = along_channels(_least_input(slopes, ctx.before, ctx.behind), steps)
        negative = _between(gradient, steps / -least, -1.0, torch.finfo(steps.dtype).tiny)
        passed = positive.addcmul_(negative, along_channels(slopes, steps))
        of_slopes = step * _sum_to(negative.mul_(steps), slopes)
        return passed, of_slopes, ctx.factor * _of_step(gradient, made, passed, steps, step), None, None, None


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


def _of_step(gradient: Tensor, made: Tensor, passed: Tensor, steps: Tensor, step: Tensor) -> Tensor:
    """The gradient of the step; ``steps`` is what was read, in steps, and ``passed`` the gradient of it."""
    return _dot(gradient, made, step) / step - _dot(passed, steps, step)


def _dot(a: Tensor, b: Tensor, step: Tensor) -> Tensor:
    """The sum of products, for each step."""
    if step.numel() == 1:
        return torch.dot(_flat(a, like=a), _flat(b, like=a))
    return (a * b).flatten(1).sum(1).view_as(step)


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The values of ``x`` in the order in which ``like`` keeps its own, which for ``like`` itself needs no copy."""
    channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (x.movedim(1, -1) if channels_last else x).flatten()


def _least_input(slopes: Tensor, before: Levels, behind: Levels) -> Tensor:
    """The end of the range of what a PReLU reads, in steps, below which it is clipped before or behind it; [slopes]."""
    end = torch.where(slopes > 0, behind.low - 0.5, behind.high + 0.5)
    return torch.where(slopes == 0, -torch.inf, end / slopes).clamp(min=before.low - 0.5)


def _sum_to(values: Tensor, slopes: Tensor) -> Tensor:
    """The sum of ``values`` [N, C, ...] for each channel, or for all where they share one slope."""
    if slopes.numel() == 1:
        return values.sum().view_as(slopes)
    return values.sum([dimension for dimension in range(values.ndim) if dimension != 1])
