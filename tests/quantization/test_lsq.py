"""Against torch's own gradients of the same values written with straight-through rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qface.quantization.lsq import lsq_fake_quantize, lsq_fake_quantize_prelu, prelu


def reference_round(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    # Releases of torch differ in the gradient of clamp where a value equals a bound, as rounded ones often do.
    inside = (x / step).clamp(low - 0.5, high + 0.5)
    return (inside + (inside.round().clamp(low, high) - inside).detach()) * step


def draw(seed: int, *shape: int) -> Tensor:
    """Values that are no ties, and not at the end of a range, in any step below."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * draw(99, *result.shape)).sum(), inputs)


BOUNDS = st.tuples(st.integers(-64, 0), st.integers(1, 64))
SEEDS = st.integers(0, 1000)


@given(SEEDS, BOUNDS, st.floats(0.01, 1), st.sampled_from([(4, 6), (2, 3, 5, 4)]), st.booleans())
def test_rounding(seed: int, bounds: tuple[int, int], scale: float, shape: tuple[int, ...], per_channel: bool) -> None:
    x = draw(seed, *shape).requires_grad_()
    step = torch.full((shape[0], *(1,) * (len(shape) - 1)) if per_channel else (1,), scale, requires_grad=True)
    mine, reference = lsq_fake_quantize(x, step, *bounds, 0.25), reference_round(x, step, *bounds)
    torch.testing.assert_close(mine, reference)
    (of_x, of_step), (wanted_of_x, wanted_of_step) = gradients(mine, x, step), gradients(reference, x, step)
    torch.testing.assert_close(of_x, wanted_of_x)
    torch.testing.assert_close(of_step, 0.25 * wanted_of_step, atol=1e-3, rtol=1e-3)


@given(SEEDS, st.floats(0.01, 1))
def test_bounds_of_channels_are_those_of_single_tensors(seed: int, scale: float) -> None:
    """Values and gradients; a scale has the sum of the channels' gradients."""
    x, slopes, step = draw(seed, 2, 3, 4, 5), draw(seed + 1, 3), torch.tensor([scale])
    low = torch.randint(-63, 1, (3,), generator=torch.Generator().manual_seed(seed))
    high = low + 63

    def apply(of_prelu: bool, x: Tensor, slopes: Tensor, low: Tensor | int, high: Tensor | int) -> tuple[Tensor, ...]:
        x, slopes, own_step = (each.clone().requires_grad_() for each in (x, slopes, step))
        made = (
            lsq_fake_quantize_prelu(x, slopes, own_step, low - 192, low, high, 1.0)
            if of_prelu
            else lsq_fake_quantize(x, own_step, low, high, 1.0)
        )
        made.backward(weights[:, : x.shape[1]] if x.shape[1] == 3 else weights[:, channel : channel + 1])
        grads = (x.grad, own_step.grad, *([slopes.grad] if of_prelu else []))
        return (made.detach(), *(grad for grad in grads if grad is not None))

    weights = draw(99, 2, 3, 4, 5)
    for of_prelu in (False, True):
        values, of_x, of_step, *of_slopes = apply(of_prelu, x, slopes, low, high)
        steps = torch.zeros(1)
        for channel in range(3):
            one = slice(channel, channel + 1)
            found = apply(of_prelu, x[:, one], slopes[one], int(low[channel]), int(high[channel]))
            torch.testing.assert_close(values[:, one], found[0])
            torch.testing.assert_close(of_x[:, one], found[1])
            steps += found[2]
            if of_prelu:
                torch.testing.assert_close(of_slopes[0][one], found[3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(of_step, steps, atol=1e-3, rtol=1e-3)


@given(SEEDS, st.integers(-40, 0), st.floats(0.01, 0.5), st.sampled_from([1, 3]))
def test_prelu_between_two_roundings(seed: int, low: int, scale: float, slope_count: int) -> None:
    input_low, high = low - 100, low + 63
    x = draw(seed, 2, 3, 4, 5).requires_grad_()
    slopes = (draw(seed + 1, slope_count) + 0.3).requires_grad_()
    step = torch.tensor([scale], requires_grad=True)
    mine = lsq_fake_quantize_prelu(x, slopes, step, input_low, low, high, 1.0)
    read = reference_round(x, step, input_low, high)
    reference = reference_round(torch.prelu(read, slopes), step, low, high)
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
    # Elsewhere it matters whether the ends of the ranges, and the sign, are those before or after rounding.
    steps = (x / step).detach()
    made = torch.prelu(steps, slopes)
    near = torch.stack([made - low, made - high, steps - high]).abs().amin(0)
    # Ranges reach half a step beyond their ends, and half a step of what is read is half a slope of what is made.
    clear = near > 0.5 + slopes.detach().abs().amax().clamp(min=1) / 2
    clear &= (steps.abs() > 0.5) & (steps > input_low + 1)
    of_x, of_step, of_slopes = gradients(mine * clear, x, step, slopes)
    wanted_of_x, wanted_of_step, wanted_of_slopes = gradients(reference * clear, x, step, slopes)
    torch.testing.assert_close(of_x, wanted_of_x)
    torch.testing.assert_close(of_step, wanted_of_step, atol=1e-3, rtol=1e-3)
    half_a_step_each = scale / 2 * (draw(99, *x.shape) * clear).abs().sum() + 1e-3
    assert ((of_slopes - wanted_of_slopes).abs() <= half_a_step_each).all()


@pytest.mark.parametrize("slope_count", [1, 3])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5)])
def test_prelu_is_torchs(slope_count: int, shape: tuple[int, ...]) -> None:
    x, slopes = draw(0, *shape).requires_grad_(), draw(1, slope_count).requires_grad_()
    mine, reference = prelu(x, slopes), torch.prelu(x, slopes)
    assert torch.equal(mine, reference)
    for mine_of, wanted in zip(gradients(mine, x, slopes), gradients(reference, x, slopes), strict=True):
        torch.testing.assert_close(mine_of, wanted)


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0, -0.5])
def test_a_prelu_passes_gradients_inside_both_ranges_only(slope: float) -> None:
    step = torch.tensor([1.0])
    x = torch.tensor([[-30.0], [-18.0], [-3.0], [7.0], [39.0], [50.0]], requires_grad=True)
    lsq_fake_quantize_prelu(x, torch.tensor([slope]), step, -20, -4, 40, 1.0).sum().backward()
    inside = [slope if value > -20 and slope * value > -4.5 else 0.0 for value in (-30, -18, -3)]
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [*inside, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("gradient_too", [True, False])
def test_channels_last_gives_the_same(gradient_too: bool) -> None:
    def results(memory_format: torch.memory_format) -> list[Tensor]:
        x = draw(0, 2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
        slopes, step = draw(1, 3).requires_grad_(), torch.tensor([0.1], requires_grad=True)
        of_made = draw(2, *x.shape)
        if gradient_too:
            of_made = of_made.contiguous(memory_format=memory_format)
        found = []
        for made in (
            lsq_fake_quantize(x, step, -9, 9, 1.0),
            lsq_fake_quantize_prelu(x, slopes, step, -20, -9, 9, 1.0),
            prelu(x, slopes),
        ):
            found += [made, *torch.autograd.grad(made, (x, slopes, step), of_made, allow_unused=True)]
        return [tensor for tensor in found if tensor is not None]

    for one, other in zip(results(torch.contiguous_format), results(torch.channels_last), strict=True):
        torch.testing.assert_close(one, other)
