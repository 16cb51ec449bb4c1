"""Exact scales: no result lies near a rounding tie, so all processors round alike.

Convolutions and matrix products multiply an int32 sum by one float32 factor and round half to even, which is the same
everywhere. Kernels of sums, products, averages and lookups differ between processors in the last bits, which matters
only near a tie. So their scales are adjusted slightly, until every exact result is further from a tie than the error of
any kernel. docs/exactness.md has the proof and the error bound of each kernel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qface.quantization.lsq import Bound
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
"""Minimum distance from a tie, in steps, of products with weights.

OpenVINO adds bias and zero point in float32 before it rounds, which was observed to round values within 2e-5 of a tie
differently.
"""
MULTIPLE_BITS = 10
"""Bits of the odd multiples in a group. With 10, the distance of a sum from a tie exceeds ARM's fixed-point error."""
_BYTE = 256.0  # upper bound of every value before rounding, zero point included
_HALF_ULP = 2.0**-24  # maximum relative error of rounding to float32
_LOOKUP_DISTANCE = 2.0**-11
"""Minimum distance from a tie, in steps, of a function of one byte: above 255 times the error of any sigmoid."""
_ROUNDED_SCALES = 2.0**-21  # maximum relative error of a ratio of three scales by their rounding to float32
_STEPS = (0, *(sign * step for step in range(1, 17) for sign in (1, -1)))
_STEP = 2.0**-10  # relative


class Scaled(Protocol):
    """A quantizer of activations."""

    @property
    def scale(self) -> Any:
        """Learned parameter, or the fixed number of the image."""

    @property
    def bits(self) -> int:
        """2 to 8."""

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """Minimum and maximum integer minus the zero point."""

    def exact_scale(self) -> Tensor:
        """Return the scale used for rounding, float32 [1]."""

    def qparams(self) -> QParams:
        """Return the quantization parameters with that scale."""


def nearest_fraction(ratio: Tensor, error: Tensor | float) -> Tensor:
    """Return the fraction k / q nearest to ``ratio`` with an odd q <= 1 / (2 error).

    An integer times k / q is at least ``error`` away from every tie. A ratio below ``2 error`` becomes 1 / q with a
    larger q.

    Args:
        ratio: float64, any shape.
        error: maximum error of a kernel in steps of the output; a number, or float64 of the same shape.
    """
    numerator = torch.floor(ratio / (2 * error)).clamp(min=1)
    return numerator / _odd(numerator / ratio)


def _odd(values: Tensor) -> Tensor:
    """Return the nearest odd integer >= 1."""
    return 2 * torch.floor(values / 2) + 1


@dataclass(eq=False)
class ScaleGroup:
    """Scales joined by sums, concatenations, maxima or clamps: odd multiples of one unit.

    The ratio of any two scales is then k / q with an odd q, so no sum of integer multiples of such ratios is half an
    integer. The scale of a group with one member is only constrained by ``ratio``.

    Args:
        members: quantizers, without duplicates.
        ratio: the product or average whose rounding the unit of this group makes exact, if any.
    """

    members: list[Scaled]
    ratio: ScaleRatio | None = None

    @property
    def fixed(self) -> Scaled | None:
        """The member with a fixed scale, the image's quantizer, if any."""
        return next((each for each in self.members if not isinstance(each.scale, Tensor)), None)

    def scales_near(self, raw: Tensor, steps: Tensor) -> Tensor:
        """Return allowed scales of a member, float64, ``steps`` steps from the one nearest to ``raw``.

        Args:
            raw: learned scale, float64 [1].
            steps: step counts, float64 [n]; zero for the nearest scale.
        """
        if len(self.members) == 1:
            return self._solve_unit(raw * (1 + _STEP * steps))
        base = self._base()
        return (_odd(raw / base) + 2 * steps).clamp(min=1) * self._solve_unit(base)

    def multiple(self, member: Scaled) -> Tensor | float:
        """Return the odd multiple of the unit that is the scale of ``member``."""
        return 1.0 if len(self.members) == 1 else _odd(_raw(member) / self._base())

    def _base(self) -> Tensor:
        """Return the power of two b with 2^9 b <= largest scale < 2^10 b."""
        largest = torch.cat([_raw(member) for member in self.members]).amax(0, keepdim=True)
        return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - MULTIPLE_BITS)

    def _solve_unit(self, unit: Tensor) -> Tensor:
        if self.fixed is not None:
            scale = _raw(self.fixed)
            return scale / self.multiple(self.fixed)
        return unit if self.ratio is None else self.ratio.solve_unit(self, unit)


@dataclass(eq=False)
class ScaleRatio:
    """Ratio ``prod(input scales) / (count x output scale)`` by which a product or average rounds.

    If the ratio is k / q with an odd q, every integer multiple of it is at least 1 / (2 q) away from a tie.

    Args:
        inputs: quantizers of the factors.
        output: quantizer of the result.
        count: divisor of the product: the number of averaged values, 1 for products.
        roundings: maximum number of float32 roundings of the result, over all kernels. The last one adds the zero
            point, which gives a value below 256 unless it is clamped.
        terms: number of dequantized values that a kernel adds in float32 before that.
    """

    inputs: tuple[Scaled, ...]
    output: Scaled
    count: int
    roundings: int
    terms: int = 0

    def groups(self, groups: Mapping[Scaled, ScaleGroup]) -> set[ScaleGroup]:
        """Return the groups of its scales."""
        return {groups[each] for each in (*self.inputs, self.output)}

    def solve_unit(self, group: ScaleGroup, unit: Tensor) -> Tensor:
        """Return the unit of ``group`` nearest to ``unit`` that turns the ratio into k / q."""
        inputs = [self._scale(quantizer, group, unit) for quantizer in self.inputs]
        ratio = self._value(inputs, self._scale(self.output, group, unit))
        fraction = nearest_fraction(ratio, self._error(ratio))
        return unit * (ratio / fraction if self.output in group.members else fraction / ratio)

    def keeps_distance(self) -> bool:
        """Return True if the ratio is k / q with a small enough q."""
        inputs = [quantizer.exact_scale().double() for quantizer in self.inputs]
        ratio = self._value(inputs, self.output.exact_scale().double())
        error = self._error(ratio)
        off = nearest_fraction(ratio, error) / ratio - 1
        return bool(ratio >= 2 * error) and bool(off.abs() < _ROUNDED_SCALES)

    def _value(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        return math.prod(inputs, start=torch.ones_like(output)) / (self.count * output)

    def _error(self, ratio: Tensor) -> Tensor:
        """Return the maximum error of a kernel in steps of the output."""
        of_result = (self.roundings - 1) * (1 << self.output.bits) + _BYTE
        return _HALF_ULP * (of_result + self.terms * _BYTE * self.count * ratio)

    def _scale(self, quantizer: Scaled, group: ScaleGroup, unit: Tensor) -> Tensor:
        if quantizer in group.members:
            return group.multiple(quantizer) * unit
        return quantizer.exact_scale().double()


@dataclass(eq=False)
class FunctionValues:
    """All values of an elementwise function of a uint8 tensor.

    Args:
        function: an elementwise module.
        source: quantizer of its input.
    """

    function: nn.Module
    source: Scaled

    def __call__(self) -> Tensor:
        """Return the results for all integers, float64 [n]."""
        scale, zero_point, low, high = self.source.qparams()
        integers = torch.arange(low, high + 1, device=scale.device)
        with torch.no_grad():
            return self.function((integers - zero_point) * scale.double())  # type: ignore[no-any-return]


@dataclass(eq=False)
class ExactScale:
    """Rule that computes the exact scale of an activation's quantizer.

    Args:
        quantizer: the quantizer.
        group: group of its scale.
        values: its input, if that is a function of a uint8 tensor.
    """

    quantizer: Scaled
    group: ScaleGroup
    values: FunctionValues | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the exact scale nearest to the learned one, float32 [1]."""
        raw = _raw(self.quantizer)
        if self.values is None:
            return self.group.scales_near(raw, torch.zeros_like(raw)).float()
        steps = torch.tensor(_STEPS, dtype=raw.dtype, device=raw.device)
        return self._first_far_from_ties(self.group.scales_near(raw, steps).float(), self.values())

    def _first_far_from_ties(self, candidates: Tensor, values: Tensor) -> Tensor:
        """Return the first of ``candidates`` [n] that keeps all values away from ties, else the first."""
        low, high = self.quantizer.bounds
        steps = (values / candidates.double()[:, None]).clamp(cast(int, low), cast(int, high))
        distances = (steps - steps.floor() - 0.5).abs().amin(1)
        return candidates[(distances > _LOOKUP_DISTANCE).int().argmax().reshape(1)]


@dataclass(eq=False)
class ExactWeightScale:
    """Rule that computes the exact scales of a weight.

    onnxruntime multiplies an int32 sum by one float32 ratio on every processor. OpenVINO adds the zero point before it
    rounds, so this ratio must be k / q too.

    Args:
        quantizer: quantizer of the weight, with a scale [C] or [1].
        source: quantizer of the layer's input.
        output: quantizer of the layer's output.
    """

    quantizer: Scaled
    source: Scaled
    output: Scaled

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the exact scales nearest to the learned ones, float32, same shape."""
        raw = _raw(self.quantizer)
        return exact_weight_scale(raw, self.source.exact_scale(), self.output.exact_scale()).float()


def exact_weight_scale(raw: Tensor, source_scale: Tensor, output_scale: Tensor) -> Tensor:
    """Return the nearest scales whose ``source_scale * scale / output_scale`` is k / q, float64.

    Args:
        raw: scales of a weight, any shape.
        source_scale: scale of the layer's input, [1].
        output_scale: scale of the layer's output, [1].
    """
    ratio = raw.double() * (source_scale.double() / output_scale.double())
    return raw * (nearest_fraction(ratio, _PRODUCT_DISTANCE) / ratio)


def _raw(quantizer: Scaled) -> Tensor:
    """Return the learned or fixed scale, float64 [1]."""
    scale = quantizer.scale
    return scale.detach().double() if isinstance(scale, Tensor) else quantizer.exact_scale().double()


def pin_ratios(
    ratios: Sequence[ScaleRatio], groups: Mapping[Scaled, ScaleGroup], sources: Mapping[Scaled, Scaled]
) -> None:
    """Assign to each ratio one scale group that is adjusted for it, without cyclic dependencies of scales.

    A ratio without a free group stays unassigned.

    Args:
        ratios: all ratios of a network.
        groups: group of each quantizer; ``ratio`` of a group is set in place.
        sources: quantizer of the input by quantizer of the output, for each function of a uint8 tensor; the output
            scale depends on the input scale.
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
    """Return groups that no other open ratio uses; groups with one member first, the output before inputs."""
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
    """Return True if ``group`` would depend on itself once it is assigned to ``ratio``."""
    reached: set[ScaleGroup] = set()
    left = list(ratio.groups(groups) - {group}) + list(depends[group])
    while left:
        each = left.pop()
        if each not in reached:
            reached.add(each)
            left += depends[each]
    return group in reached
