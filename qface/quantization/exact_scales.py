"""Scales with which every processor rounds alike, because no result lies near a rounding tie.

Convolutions and matrix products round an int32 sum times one float32 factor, half to even, which is the same
everywhere. Kernels of sums, products, averages and lookups differ between processors in the last bits, which matters
next to a tie only. So their scales are moved a little, until the exact result is further from every tie than any kernel
errs. docs/exactness.md has the proof and the bound of each kernel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qface.quantization.qparams import QParams

__all__ = [
    "ExactScale",
    "ExactWeightScale",
    "FunctionValues",
    "ScaleGroup",
    "ScaleRatio",
    "Scaled",
    "exact_weight_scale",
    "pin_ratios",
]

_PRODUCT_DISTANCE = 2.0**-13
"""Distance from a tie, in steps, that products with weights keep.

OpenVINO adds bias and zero point in float32 before it rounds; values nearer than 2e-5 were seen to be rounded
otherwise.
"""
MULTIPLE_BITS = 10
"""Bits of the odd multiples in a group. With 10, a sum is further from a tie than the fixed point of ARM errs."""
_BYTE = 256.0  # above every value that is rounded, zero point included
_HALF_ULP = 2.0**-24  # the most by which rounding to float32 errs, relative
_LOOKUP_DISTANCE = 2.0**-11
"""Distance from a tie, in steps, that a function of one byte keeps: more than 255 times the error of any sigmoid."""
_ROUNDED_SCALES = 2.0**-21  # relative; a ratio of three float32 scales is nearer than that to what it was meant to be
_STEPS = (0, *(sign * step for step in range(1, 17) for sign in (1, -1)))
_STEP = 2.0**-10  # relative


class Scaled(Protocol):
    """A quantizer of activations."""

    @property
    def scale(self) -> Any:
        """The parameter that was learned, or the number that an image has."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest integer, counted from the zero point."""

    def exact_scale(self) -> Tensor:
        """The scale that rounds, float32 [1]."""

    def qparams(self) -> QParams:
        """With that scale."""


def nearest_fraction(ratio: Tensor, error: Tensor | float) -> Tensor:
    """The nearest k / q with an odd q of at most 1 / (2 error), so that k / q times an integer keeps off ties by that.

    A ratio below 2 error is 1 / q with a greater q.

    Args:
        ratio: float64, any shape.
        error: how much kernels err, in steps of the output; a number, or float64 of that shape.
    """
    numerator = torch.floor(ratio / (2 * error)).clamp(min=1)
    return numerator / _odd(numerator / ratio)


def _odd(values: Tensor) -> Tensor:
    """The nearest odd integer, at least 1."""
    return 2 * torch.floor(values / 2) + 1


@dataclass(eq=False)
class ScaleGroup:
    """Scales that meet in sums, concatenations, maxima or clamps: odd multiples of one unit.

    The ratio of two of them is k / q with an odd q, so that no sum of multiples of such ratios is half an integer. A
    group of one is free, but for its ratio.

    Args:
        members: quantizers, each once.
        ratio: an operation whose rounding the unit of this group has to suit.
    """

    members: list[Scaled]
    ratio: ScaleRatio | None = None

    @property
    def fixed(self) -> Scaled | None:
        """The quantizer of the image, if it is a member: its scale cannot be moved."""
        return next((each for each in self.members if not isinstance(each.scale, Tensor)), None)

    def scales_near(self, raw: Tensor, steps: Tensor) -> Tensor:
        """Scales that a member may have, float64, the nearest to ``raw`` and so many ``steps`` from it."""
        if len(self.members) == 1:
            return self._settled(raw * (1 + _STEP * steps))
        base = self._base()
        return (_odd(raw / base) + 2 * steps).clamp(min=1) * self._settled(base)

    def multiple(self, member: Scaled) -> Tensor | float:
        """The odd number by which the scale of ``member`` is a multiple of the unit."""
        return 1.0 if len(self.members) == 1 else _odd(_raw(member) / self._base())

    def _base(self) -> Tensor:
        """A power of two of which the largest scale is between 2^9 and 2^10 times."""
        largest = torch.cat([_raw(member) for member in self.members]).amax(0, keepdim=True)
        return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - MULTIPLE_BITS)

    def _settled(self, unit: Tensor) -> Tensor:
        if self.fixed is not None:
            scale = _raw(self.fixed)
            return scale / self.multiple(self.fixed)
        return unit if self.ratio is None else self.ratio.settled(self, unit)


@dataclass(eq=False)
class ScaleRatio:
    """An operation that rounds integers times ``product of input scales / (count x output scale)``.

    Where this is k / q with an odd q, no integer times it is half an integer, and none is nearer to one than 1 / (2 q).

    Args:
        inputs: quantizers of the factors.
        output: quantizer of the result.
        count: what the product is divided by: values of an average.
        roundings: to float32 of the result, in the kernel that has most of them; the last adds the zero point, which
            makes a value below 256. A result that is clamped does not count.
        terms: dequantized values that a kernel adds in float32 before that.
    """

    inputs: tuple[Scaled, ...]
    output: Scaled
    count: int
    roundings: int
    terms: int = 0

    def groups(self, groups: Mapping[Scaled, ScaleGroup]) -> set[ScaleGroup]:
        """The groups of its scales."""
        return {groups[each] for each in (*self.inputs, self.output)}

    def settled(self, group: ScaleGroup, unit: Tensor) -> Tensor:
        """The unit of ``group`` nearest to ``unit`` that makes the ratio k / q."""
        inputs = [self._scale(quantizer, group, unit) for quantizer in self.inputs]
        ratio = self._value(inputs, self._scale(self.output, group, unit))
        fraction = nearest_fraction(ratio, self._error(ratio))
        return unit * (ratio / fraction if self.output in group.members else fraction / ratio)

    def keeps_distance(self) -> bool:
        """True if the ratio is k / q, and q is small enough."""
        inputs = [quantizer.exact_scale().double() for quantizer in self.inputs]
        ratio = self._value(inputs, self.output.exact_scale().double())
        error = self._error(ratio)
        off = nearest_fraction(ratio, error) / ratio - 1
        return bool(ratio >= 2 * error) and bool(off.abs() < _ROUNDED_SCALES)

    def _value(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        return math.prod(inputs, start=torch.ones_like(output)) / (self.count * output)

    def _error(self, ratio: Tensor) -> Tensor:
        """The error of a kernel at most, in steps of the output."""
        low, high = self.output.bounds
        of_result = (self.roundings - 1) * (high - low + 1) + _BYTE
        return _HALF_ULP * (of_result + self.terms * _BYTE * self.count * ratio)

    def _scale(self, quantizer: Scaled, group: ScaleGroup, unit: Tensor) -> Tensor:
        if quantizer in group.members:
            return group.multiple(quantizer) * unit
        return quantizer.exact_scale().double()


@dataclass(eq=False)
class FunctionValues:
    """All values that a function of one byte makes.

    Args:
        function: of each value alone.
        source: quantizer of what it reads.
    """

    function: nn.Module
    source: Scaled

    def __call__(self) -> Tensor:
        """The results, float64 [number of integers]."""
        scale, zero_point, low, high = self.source.qparams()
        integers = torch.arange(low, high + 1, device=scale.device)
        with torch.no_grad():
            return self.function((integers - zero_point) * scale.double())  # type: ignore[no-any-return]


@dataclass(eq=False)
class ExactScale:
    """The rule for the scale of one quantizer.

    Args:
        quantizer: whose scale it is.
        group: its group.
        values: what it rounds, where that is a function of one byte.
    """

    quantizer: Scaled
    group: ScaleGroup
    values: FunctionValues | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The scale nearest to the learned one, float32 [1]."""
        raw = _raw(self.quantizer)
        if self.values is None:
            return self.group.scales_near(raw, torch.zeros_like(raw)).float()
        steps = torch.tensor(_STEPS, dtype=raw.dtype, device=raw.device)
        return self._first_far_from_ties(self.group.scales_near(raw, steps).float(), self.values())

    def _first_far_from_ties(self, candidates: Tensor, values: Tensor) -> Tensor:
        """The first of ``candidates`` [n] with which no value is near a tie; else the first of all."""
        low, high = self.quantizer.bounds
        steps = (values / candidates.double()[:, None]).clamp(low, high)
        distances = (steps - steps.floor() - 0.5).abs().amin(1)
        return candidates[(distances > _LOOKUP_DISTANCE).int().argmax().reshape(1)]


@dataclass(eq=False)
class ExactWeightScale:
    """The rule for the scales of a weight.

    onnxruntime multiplies an int32 sum by one float32 ratio on every processor. OpenVINO adds the zero point before it
    rounds, so that ratio is k / q too.

    Args:
        quantizer: of the weight, whose scale is [channels] or [1].
        source: of what the layer reads.
        output: of what it makes.
    """

    quantizer: Scaled
    source: Scaled
    output: Scaled

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The scales nearest to the learned ones, float32, of their shape."""
        raw = _raw(self.quantizer)
        return exact_weight_scale(raw, self.source.exact_scale(), self.output.exact_scale()).float()


def exact_weight_scale(raw: Tensor, source_scale: Tensor, output_scale: Tensor) -> Tensor:
    """The scales, float64, nearest to ``raw`` with which ``source_scale * scale / output_scale`` is k / q.

    Args:
        raw: any shape.
        source_scale: [1], of what a layer reads.
        output_scale: [1], of what it makes.
    """
    ratio = raw.double() * (source_scale.double() / output_scale.double())
    return raw * (nearest_fraction(ratio, _PRODUCT_DISTANCE) / ratio)


def _raw(quantizer: Scaled) -> Tensor:
    """The scale as it was learned or given, float64 [1]."""
    scale = quantizer.scale
    return scale.detach().double() if isinstance(scale, Tensor) else quantizer.exact_scale().double()


def pin_ratios(
    ratios: Sequence[ScaleRatio], groups: Mapping[Scaled, ScaleGroup], sources: Mapping[Scaled, Scaled]
) -> None:
    """Give each ratio a group of its own that suits it, so that no scale depends on itself.

    A ratio for which no group is left has none.

    Args:
        ratios: all of a network.
        groups: of each quantizer.
        sources: what a function of one byte reads, by what it makes, whose scale depends on that.
    """
    depends = {group: {groups[sources[each]] for each in group.members if each in sources} for group in groups.values()}
    readers = Counter(group for ratio in ratios for group in ratio.groups(groups))
    open_ratios = list(ratios)
    while True:
        choices = ((ratio, group) for ratio in open_ratios for group in _free(ratio, readers, groups))
        found = next((choice for choice in choices if not _depends_on_itself(*choice, groups, depends)), None)
        if found is None:
            return
        ratio, group = found
        group.ratio = ratio
        depends[group] |= ratio.groups(groups) - {group}
        readers.subtract(ratio.groups(groups))
        open_ratios.remove(ratio)


def _free(
    ratio: ScaleRatio, readers: Mapping[ScaleGroup, int], groups: Mapping[Scaled, ScaleGroup]
) -> list[ScaleGroup]:
    """Groups that may suit ``ratio``: no other open ratio reads them; those of one member, and the output, first."""
    used = [groups[each] for each in (ratio.output, *ratio.inputs)]
    free = [
        group
        for group in dict.fromkeys(used)
        if used.count(group) == 1 and readers[group] == 1 and group.ratio is None and group.fixed is None
    ]
    return sorted(free, key=lambda group: len(group.members) > 1)


def _depends_on_itself(
    ratio: ScaleRatio,
    group: ScaleGroup,
    groups: Mapping[Scaled, ScaleGroup],
    depends: Mapping[ScaleGroup, set[ScaleGroup]],
) -> bool:
    """True if ``group`` would, once it suits ``ratio``."""
    reached: set[ScaleGroup] = set()
    left = list(ratio.groups(groups) - {group}) + list(depends[group])
    while left:
        each = left.pop()
        if each not in reached:
            reached.add(each)
            left += depends[each]
    return group in reached
