"""Weights whose channels have integers of their own: which are chosen, and what the quantizer does with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qface
from qface.errors import CheckpointError
from qface.models.store import save
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import CalibrationConfig, QuantizationConfig, WeightFakeQuantize, calibrate, quantize
from qface.quantization.fake_quantize import offset_range
from qface.quantization.weight_qparams import WeightQParams, candidate_qparams
from tests.networks import random_faces, tiny_face_net

SIZE = Preprocessing(size=(32, 32))
FACES = random_faces(32)


def quantizer_of(weight: Tensor, bits: int, observer: str = "mse") -> WeightFakeQuantize:
    quantizer = WeightFakeQuantize(bits, len(weight), observer)
    quantizer.observe(weight)
    quantizer.set_range()
    return quantizer


def errors(weight: Tensor, quantizer: WeightFakeQuantize, qparams: WeightQParams) -> Tensor:
    quantizer.set_weight_qparams(qparams.scale, qparams.offset, qparams.stride)
    return (quantizer.eval()(weight) - weight).square().sum(1)


@st.composite
def offset_quantizers(draw: st.DrawFn) -> tuple[WeightFakeQuantize, Tensor]:
    """A quantizer with any parameters that it may have, and a weight that may reach beyond it."""
    bits, stride, channels = draw(st.integers(2, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    low, high = offset_range(bits, stride)
    quantizer = WeightFakeQuantize(bits, channels)
    scale = torch.rand(channels, generator=generator) + 0.1
    quantizer.set_weight_qparams(scale, torch.randint(low, high + 1, (channels,), generator=generator), stride)
    return quantizer, 20 * torch.randn(channels, 7, generator=generator)


@given(offset_quantizers())
def test_levels_are_as_many_as_the_bits_allow_and_safe_on_all_processors(
    case: tuple[WeightFakeQuantize, Tensor],
) -> None:
    quantizer, weight = case
    integers = quantizer.integers(torch.linspace(-200, 200, 997).expand(len(weight), -1))
    assert integers.abs().max() <= 64
    assert all(len(channel.unique()) <= 2**quantizer.bits for channel in integers)
    step = int(quantizer.stride) * quantizer.scale.detach()[:, None]
    levels = integers.sort(1).values * quantizer.scale.detach()[:, None]
    inside = torch.minimum(torch.maximum(weight, levels[:, :1]), levels[:, -1:])
    assert ((quantizer.eval()(weight) - inside).abs() <= 0.501 * step).all()


@given(offset_quantizers())
def test_training_rounds_to_the_same_levels_and_learns_the_scale(case: tuple[WeightFakeQuantize, Tensor]) -> None:
    quantizer, weight = case
    deployed = quantizer.eval()(weight)
    steps = weight / quantizer.scale.detach()[:, None] - quantizer.offset[:, None]
    clear = (steps / int(quantizer.stride) - 0.5 - (steps / int(quantizer.stride) - 0.5).round()).abs() > 1e-3
    trained = quantizer.train()(weight.requires_grad_())
    torch.testing.assert_close(trained[clear], deployed[clear], rtol=1e-4, atol=1e-4)
    (trained - deployed + 1).square().sum().backward()
    assert weight.grad is not None and quantizer.scale.grad is not None
    assert set(weight.grad.unique().tolist()) <= set((2 * (trained - deployed + 1)).unique().tolist()) | {0.0}
    assert torch.isfinite(quantizer.scale.grad).all()


def test_the_gradient_of_the_scale_is_that_of_scaled_integers() -> None:
    """Where all weights are outside, the output is scale times an integer, here 5; divided by the sum of squares."""
    quantizer = WeightFakeQuantize(2, 1)
    quantizer.set_weight_qparams(torch.tensor([1.0]), torch.tensor([3]), stride=2)
    quantizer(torch.tensor([[100.0, 100.0]])).sum().backward()
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(2 * 5 / (2 * 5**2))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_offsets_suit_weights_of_one_sign(bits: int) -> None:
    weight = torch.rand(8, 9, generator=torch.Generator().manual_seed(0)) + 0.2
    quantizer = quantizer_of(weight, bits)
    symmetric, offset = candidate_qparams(quantizer, weight, torch.ones_like(weight))
    assert (errors(weight, quantizer, offset) < 0.6 * errors(weight, quantizer, symmetric)).all()


def test_two_bits_are_symmetric_without_a_level_at_zero() -> None:
    weight = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_of(weight, 2)
    symmetric, offset = candidate_qparams(quantizer, weight, torch.ones_like(weight))
    ratio = errors(weight, quantizer, offset) / errors(weight, quantizer, symmetric)
    assert (ratio < 0.9).all()
    assert ((offset.offset - 1).abs() <= 1).all()
    # The best four equidistant values leave 0.1188 (Max, 1960).
    assert (errors(weight, quantizer, offset) / 4000 < 0.13).all()


def test_important_weights_count() -> None:
    weight = torch.tensor([[-1.0, 0.1, 0.3, 0.35, 0.4]])
    quantizer = quantizer_of(weight, 2)
    importance = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    _, qparams = candidate_qparams(quantizer, weight, importance)
    quantizer.set_weight_qparams(qparams.scale, qparams.offset, qparams.stride)
    error = (quantizer.eval()(weight) - weight).square()
    assert error[0, 1:].sum() < 0.01 < error[0, 0]


@pytest.mark.parametrize(("bits", "observer"), [(7, "mse"), (8, "mse"), (4, "minmax"), (4, "percentile")])
def test_other_weights_stay_symmetric(bits: int, observer: str) -> None:
    weight = torch.rand(3, 5)
    quantizer = quantizer_of(weight, bits, observer)
    (qparams,) = candidate_qparams(quantizer, weight, torch.ones_like(weight))
    assert torch.equal(qparams.scale, quantizer.scale) and not qparams.offset.any() and qparams.stride == 1


def test_channels_of_equal_weights_keep_their_scale() -> None:
    weight = torch.tensor([[0.0] * 4, [2.0] * 4])
    quantizer = quantizer_of(weight, 4)
    _, qparams = candidate_qparams(quantizer, weight, torch.ones_like(weight))
    assert torch.equal(2 * qparams.scale, quantizer.scale) and not qparams.offset.any()


def student(bits: int = 4) -> nn.Module:
    model = with_preprocessing(tiny_face_net(size=SIZE.size), SIZE).eval()
    return calibrate(quantize(model, QuantizationConfig(bits, 8)), FACES, CalibrationConfig(equalize=False))


def test_ranges_that_are_set_again_keep_the_levels_of_weights() -> None:
    once = student()
    before = {name: value.clone() for name, value in once.state_dict().items() if "weight_fake_quant" in name}
    again = calibrate(once, random_faces(16, seed=5))
    after = again.state_dict()
    assert any(value.any() for name, value in before.items() if name.endswith("offset"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("name", "value"), [("stride", 3), ("offset", 100), ("offset", -100)])
def test_files_with_other_levels_are_refused(tmp_path: Path, name: str, value: int) -> None:
    network = student()
    path = tmp_path / "student.safetensors"
    save(network, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(f"weight_fake_quant.{name}")]:
        tensors[key].fill_(value)
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=name):
        qface.load(path)
