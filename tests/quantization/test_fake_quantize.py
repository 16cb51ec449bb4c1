from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.ao import quantization as torch_ao

from qface.errors import ConfigError
from qface.quantization import ImageFakeQuantize, LSQFakeQuantize

VALUES = st.integers(-25_600, 25_600).map(lambda n: n / 256)


def calibrated(bits: int, x: Tensor, num_channels: int | None = None, observer: str = "minmax") -> LSQFakeQuantize:
    quantizer = LSQFakeQuantize(bits, num_channels, observer)
    quantizer.activation_post_process(x)
    quantizer.set_range()
    return quantizer


@st.composite
def cases(draw: st.DrawFn) -> tuple[LSQFakeQuantize, Tensor]:
    """A calibrated quantizer, and a tensor that may reach beyond its range."""
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=4, max_side=6))
    seen, x = (torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=VALUES))) for _ in range(2))
    per_channel = draw(st.booleans())
    return calibrated(draw(st.integers(2, 8)), seen, len(x) if per_channel else None), x


def per_channel_view(quantizer: LSQFakeQuantize, values: Tensor, like: Tensor) -> Tensor:
    return values.detach().view(-1, *(1,) * (like.ndim - 1)) if quantizer.num_channels else values.detach()


@given(cases())
def test_no_more_integers_than_the_bits_allow_and_the_error_is_half_a_step(
    case: tuple[LSQFakeQuantize, Tensor],
) -> None:
    quantizer, x = case
    y = quantizer.eval()(x)
    for channel in y if quantizer.num_channels else [y]:
        assert len(channel.unique()) <= 2**quantizer.bits
    scale = per_channel_view(quantizer, quantizer.scale, x)
    zero_point = per_channel_view(quantizer, quantizer.zero_point, x)
    low, high = (quantizer.quant_min - zero_point) * scale, (quantizer.quant_max - zero_point) * scale
    inside = torch.minimum(torch.maximum(x, low), high)
    assert ((y - inside).abs() <= 0.501 * scale).all()
    assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros_like(x))
    torch.testing.assert_close(quantizer.integers(x), y / scale + zero_point, atol=1e-3, rtol=0)


@given(cases())
def test_both_modes_agree_but_for_ties(case: tuple[LSQFakeQuantize, Tensor]) -> None:
    quantizer, x = case
    scale = per_channel_view(quantizer, quantizer.scale, x)
    deployed = quantizer.eval()(x)
    steps = x / scale
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    quantizer.train()
    learning = quantizer(x)
    quantizer.scale.requires_grad_(False)
    frozen = quantizer(x)
    for trained in (learning, frozen):
        difference = (trained - deployed).abs() / scale
        assert (difference[~tie] < 1e-3).all()
        assert (difference < 1.001).all()


@given(cases(), st.booleans())
def test_gradients_pass_inside_the_range_only(case: tuple[LSQFakeQuantize, Tensor], learning: bool) -> None:
    quantizer, x = case
    quantizer.scale.requires_grad_(learning)
    x.requires_grad_()
    quantizer.train()(x).sum().backward()
    scale = per_channel_view(quantizer, quantizer.scale, x)
    zero_point = per_channel_view(quantizer, quantizer.zero_point, x)
    steps = x.detach() / scale + zero_point
    inside = (steps > quantizer.quant_min - 0.49) & (steps < quantizer.quant_max + 0.49)
    outside = (steps < quantizer.quant_min - 0.51) | (steps > quantizer.quant_max + 0.51)
    assert (x.grad[inside] == 1).all()
    assert (x.grad[outside] == 0).all()


@pytest.mark.parametrize("channels", [None, 3])
def test_the_scale_learns_in_training_mode_only(channels: int | None) -> None:
    x = torch.linspace(-3, 3, 60).view(3, 20)
    quantizer = calibrated(4, x / 4, channels).train()  # so most values are clipped, and a wider scale is better
    optimizer = torch.optim.SGD([quantizer.scale], 0.05)
    errors = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        errors.append(loss.item())
        optimizer.step()
    assert errors[-1] < 0.9 * errors[0]
    assert not quantizer.eval()(x).requires_grad


def test_a_scale_that_was_pushed_below_zero_is_lifted() -> None:
    x = torch.linspace(-1, 1, 9).view(3, 3)
    quantizer = calibrated(4, x).train()
    quantizer.scale.data.fill_(-1.0)
    assert quantizer(x).isfinite().all()
    assert quantizer.scale > 0


def test_without_calibration_there_is_no_result() -> None:
    quantizer = LSQFakeQuantize(6)
    for mode in (True, False):
        with pytest.raises(ConfigError, match="calibrate"):
            quantizer.train(mode)(torch.ones(1))


@pytest.mark.parametrize("channels", [None, 2])
def test_torch_ao_switches_observation_and_rounding(channels: int | None) -> None:
    x = torch.tensor([[0.1, 0.72], [-1.0, 0.33]])
    model = nn.Sequential(calibrated(3, x, channels))
    (quantizer,) = model
    rounded = model(x)
    assert not torch.equal(rounded, x)

    model.apply(torch_ao.disable_fake_quant)
    assert torch.equal(model(x), x)
    model.apply(torch_ao.enable_fake_quant)
    assert torch.equal(model(x), rounded)

    model(100 * x)  # observers are off
    assert torch.equal(model(x), rounded)
    model.apply(torch_ao.enable_observer)
    model(100 * x)
    model.apply(torch_ao.disable_observer)
    assert torch.allclose(quantizer.eval()(100 * x), 100 * rounded, rtol=1e-5)
    assert torch.equal(quantizer(x), quantizer(x))


def test_an_observer_of_a_weight_looks_at_its_last_value_only() -> None:
    quantizer = LSQFakeQuantize(8, num_channels=1, observer="minmax")
    quantizer.enable_observer()
    quantizer(torch.full((1, 4), 100.0))
    quantizer(torch.full((1, 4), 1.0))
    assert quantizer.scale.item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("channels", [None, 2])
def test_state_survives(channels: int | None) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    source = calibrated(5, x, channels)
    source.enable_observer()
    target = LSQFakeQuantize(5, channels)
    target.load_state_dict(source.state_dict())
    assert target.observing
    for each in (source, target):
        each.enable_observer(False)
    assert torch.equal(target.eval()(x), source.eval()(x))
    source.enable_fake_quant(False)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), x)


# ---- images

BYTES = torch.arange(256.0)


def image_quantizer(mean: float, std: float) -> ImageFakeQuantize:
    return ImageFakeQuantize(scale=1 / std, zero_point=round(mean), offset=(round(mean) - mean) / std)


def check_bytes(mean: float, std: float) -> None:
    quantizer = image_quantizer(mean, std)
    normalized = (BYTES - mean) / std
    rounded = quantizer(normalized)
    qparams = quantizer.qparams()
    assert torch.equal((rounded / qparams.scale).round() + qparams.zero_point, BYTES)
    assert len(rounded.unique()) == 256
    assert (rounded - normalized).abs().max() <= 0.501 / std  # half a gray level, the same for all


@pytest.mark.parametrize("std", [127.5, 128.0])
def test_bytes_as_insightface_normalizes_them(std: float) -> None:
    check_bytes(127.5, std)


@given(st.floats(0, 255), st.floats(0.1, 1000))
def test_bytes_are_exact_for_any_normalization(mean: float, std: float) -> None:
    check_bytes(mean, std)


def test_images_are_rounded_even_without_calibration_and_can_be_left_alone() -> None:
    quantizer = image_quantizer(127.5, 128)
    x = torch.tensor([0.1234])
    assert not torch.equal(quantizer(x), x)
    quantizer.apply(torch_ao.disable_fake_quant)
    assert torch.equal(quantizer(x), x)
