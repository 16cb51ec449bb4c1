"""No result of a kernel that rounds by arithmetic of its own lies near a tie, whatever scales were learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import qface
from qface.deployment import integer_graph as ir
from qface.deployment import lower
from qface.quantization import LSQFakeQuantize
from qface.quantization.binding import layers_near_ties
from tests.deployment.networks import CHANNELS, Applied, Gate, Joined, Sum, calibrated, framed, prelu

Floats = npt.NDArray[np.float64]


def conv(*args: object, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, *args, **kwargs)  # type: ignore[arg-type]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "sums": lambda: nn.Sequential(conv(1), *(Sum(conv(3, padding=1)) for _ in range(3)), conv(1)),
    "a sum of itself": lambda: nn.Sequential(Sum(nn.Identity()), conv(1)),
    "product": lambda: nn.Sequential(Applied(lambda x: x * F.relu(x)), conv(1)),
    "square": lambda: nn.Sequential(Applied(lambda x: x * x), conv(1)),
    "SiLU": lambda: nn.Sequential(nn.SiLU(), conv(1), nn.SiLU(), conv(1)),
    "hard swish": lambda: nn.Sequential(nn.Hardswish(), conv(1)),
    "gated block": lambda: nn.Sequential(
        *(Sum(nn.Sequential(conv(1), nn.SiLU(), Gate(nn.Sigmoid()))) for _ in range(2)), conv(1)
    ),
    "concatenation": lambda: nn.Sequential(Joined(conv(1), Joined(conv(1), nn.Identity())), nn.Conv2d(24, 8, 1)),
    "maximum": lambda: nn.Sequential(Applied(lambda x: torch.maximum(x, F.leaky_relu(x, 0.1) + x)), conv(1)),
    "PReLU": lambda: nn.Sequential(conv(1), prelu(0.2, 0.7), conv(1), prelu(0.4)),
    "clamps": lambda: nn.Sequential(Sum(nn.ReLU(), nn.ReLU6()), conv(1)),
    "average pools": lambda: nn.Sequential(nn.AvgPool2d(2), conv(1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "global average": lambda: nn.Sequential(conv(1), nn.AvgPool2d(12)),
}


@cache
def student(body: str, bits: int) -> fx.GraphModule:
    return calibrated(framed(BODIES[body]), bits)


def with_scales(body: str, bits: int, seed: int) -> fx.GraphModule:
    """A student whose scales were learned to be anything."""
    rng = np.random.default_rng(seed)
    changed = copy.deepcopy(student(body, bits))
    for quantizer in changed.modules():
        if isinstance(quantizer, LSQFakeQuantize) and quantizer.num_channels is None:
            zero_point = rng.integers(quantizer.quant_min, quantizer.quant_max, endpoint=True)
            quantizer.set_qparams(quantizer.scale * rng.uniform(0.4, 2.5), torch.tensor([zero_point]))
    return changed


def values(value: ir.Value) -> Floats:
    """The value of each integer; exact, since a scale has 24 bits."""
    assert value.qparams is not None
    return value.qparams.scale * (np.arange(256.0) - value.qparams.zero_point)


def results(operation: ir.IntegerOp) -> Iterator[tuple[Floats, float]]:
    """All that ``operation`` may round by arithmetic of its own, and how much its kernels err, in steps of its output.

    A rounding to float32 errs by 2^-24 of the value, which is below 2^bits, and below 256 with its zero point.
    """
    assert operation.output.qparams is not None
    rounding, last = 2.0 ** (operation.output.qparams.bits - 24), 2.0**-16
    if isinstance(operation, ir.MultiplyOp):
        yield np.outer(*map(values, operation.inputs)), 4 * rounding + last
    elif isinstance(operation, (ir.ConcatOp, ir.MaxOp, ir.ClampOp)):
        yield from ((values(source), 2 * rounding + last) for source in operation.inputs)
    elif isinstance(operation, ir.AveragePoolOp):
        kernel = operation.kernel[0] * operation.kernel[1]
        terms = operation.inputs[0].qparams.scale / operation.output.qparams.scale
        for count in (4, 6, 9) if kernel == 9 else (kernel,):
            yield averages(operation, count), 4 * rounding + last + kernel * 2.0**-16 * terms
    elif isinstance(operation, ir.GlobalAveragePoolOp):
        yield averages(operation, 12 * 12), 3 * rounding + last
    elif isinstance(operation, (ir.ConvolutionOp, ir.AffineOp)):
        assert operation.inputs[0].qparams is not None
        for scale in operation.weight.scale.astype(np.float64):
            products = np.arange(-20_000, 20_001) * (operation.inputs[0].qparams.scale * scale)
            yield products, 4 * rounding + last
    elif isinstance(operation, ir.SigmoidOp):
        yield torch.sigmoid(torch.from_numpy(values(operation.inputs[0]))).numpy(), 8 * rounding + last


def averages(operation: ir.IntegerOp, count: int) -> Floats:
    """All that ``count`` values may be on average."""
    qparams = operation.inputs[0].qparams
    assert qparams is not None
    low, high = (count * (end - qparams.zero_point) for end in (0, 255))
    return np.arange(low, high + 1) * qparams.scale / count


def distance_from_ties(results: Floats, output: ir.Value) -> float:
    """Least distance of what is not clamped from half an integer, in steps of ``output``."""
    assert output.qparams is not None
    low, high = (end - output.qparams.zero_point for end in (output.qparams.quant_min, output.qparams.quant_max))
    steps = (results / output.qparams.scale).clip(low, high)
    return float(np.abs(steps - np.floor(steps) - 0.5).min())


def error_of_sums(operation: ir.AddOp) -> float:
    """The most that any kernel errs: float32 with and without fused multiply-add, or fixed point of 21 bits (ARM)."""
    scales = [value.qparams.scale for value in (*operation.inputs, operation.output)]
    ratios = [scale / scales[-1] for scale in scales[:2]]
    in_float = 2.0**-24 * 255 * (7 * sum(ratios) + 3)
    # Two multipliers rounded to half a unit, from ratios rounded to a quarter of one, and one unit for the sign.
    fixed_point = (0.75 * 510 + 1) * 2.0 ** (np.floor(np.log2(max(ratios))) - 21)
    return max(in_float, fixed_point)


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=4, deadline=None)
@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32 - 1))
def test_results_keep_their_distance_from_ties(body: str, bits: int, seed: int) -> None:
    checked = 0
    for operation in lower(with_scales(body, bits, seed)).operations:
        if isinstance(operation, ir.AddOp):
            first, last = (values(source) for source in operation.inputs)
            distance = distance_from_ties(np.add.outer(first, last), operation.output)
            assert distance > error_of_sums(operation), operation.name
            checked += 1
        elif operation.output.qparams is not None:
            for made, error in results(operation):
                assert distance_from_ties(made, operation.output) > error, operation.name
                checked += 1
    assert checked


@pytest.mark.parametrize("body", BODIES)
def test_scales_move_little(body: str) -> None:
    for seed in range(4):
        for quantizer in with_scales(body, 8, seed).modules():
            if isinstance(quantizer, LSQFakeQuantize):
                assert quantizer.exact_scale() == pytest.approx(quantizer.scale.detach(), rel=0.05)


def test_layers_that_no_scale_suits_are_named() -> None:
    assert layers_near_ties(student("gated block", 8)) == ()
    wide = framed(lambda: nn.Sequential(conv(1), nn.Upsample(scale_factor=8), nn.AdaptiveAvgPool2d(1)))
    of_many = calibrated(wide, 8)
    for quantizer in of_many.modules():
        if isinstance(quantizer, LSQFakeQuantize) and quantizer.num_channels is None:
            quantizer.set_qparams(torch.tensor([0.1]), torch.tensor([128]))
    assert layers_near_ties(of_many) == ("body.2",)


def test_scales_still_learn() -> None:
    trained = copy.deepcopy(student("sums", 4)).train()
    trained(torch.randn(2, 3, 24, 24)).square().sum().backward()
    scales = [each for each in trained.modules() if isinstance(each, LSQFakeQuantize) and each.scale_rule is not None]
    assert len(scales) > 3
    assert all(each.scale.grad is not None and bool(each.scale.grad.abs().max() > 0) for each in scales)


def test_copies_have_scales_of_their_own() -> None:
    one = student("sums", 4)
    before = [value.qparams for value in (each.output for each in lower(one).operations)]
    other = copy.deepcopy(one)
    for quantizer in other.modules():
        if isinstance(quantizer, LSQFakeQuantize):
            quantizer.scale.data.mul_(3)
    assert [value.qparams for value in (each.output for each in lower(one).operations)] == before


def test_saved_students_keep_their_scales(tmp_path) -> None:
    one = student("gated block", 8)
    qface.save(one, tmp_path / "student.safetensors")
    loaded = qface.load(tmp_path / "student.safetensors")
    assert [each.output for each in lower(loaded).operations] == [each.output for each in lower(one).operations]
