"""Weights rounded so that they make up for each other's errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qface.models.patches import Positions, patches
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import CalibrationConfig, LayerBits, QuantizationConfig, calibrate, gptq, quantize
from qface.quantization.gptq import statistics_for, weight_of
from qface.quantization.quantized_layers import QuantizedLinear, WeightedLayer
from tests.deployment.networks import framed
from tests.networks import foreign_net, random_faces, tiny_face_net

SIZE = Preprocessing(size=(32, 32))
FACES = random_faces(64)


def calibrated(model: nn.Module, weight_bits: int, gptq: bool, observer: str = "mse") -> nn.Module:
    student = quantize(model, QuantizationConfig(weight_bits, 8, weight_observer=observer))
    return calibrate(student, FACES, CalibrationConfig(equalize=False, gptq=gptq, correct_biases=False)).eval()


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_the_embedding_is_closer(make: Callable[..., nn.Module]) -> None:
    model = with_preprocessing(make(size=SIZE.size), SIZE).eval()
    x = SIZE(random_faces(32, seed=3))
    with torch.no_grad():
        expected = model(x)
        plain, rounded = (
            1 - torch.cosine_similarity(calibrated(model, 4, choice)(x), expected).mean() for choice in (False, True)
        )
    assert rounded < 0.9 * plain


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
@pytest.mark.parametrize("observer", ["mse", "minmax"])
def test_weights_are_multiples_of_their_scales(make: Callable[..., nn.Module], observer: str) -> None:
    """Ranges that the user asks for stay; those of least error may move, as GPTQ knows the error of the output."""
    model = with_preprocessing(make(size=SIZE.size), SIZE).eval()
    plain, rounded = (calibrated(model, 4, choice, observer) for choice in (False, True))
    for one, other in zip(plain.modules(), rounded.modules(), strict=True):
        if isinstance(one, WeightedLayer):
            assert torch.equal(one.weight_fake_quant.scale, other.weight_fake_quant.scale) == (observer == "minmax")
            rounded = other.weight_fake_quant(other.weight)
            torch.testing.assert_close(rounded, other.weight, rtol=1e-5, atol=1e-7)
            assert (other.weight - one.weight).abs().max() > 0


def test_a_layer_of_two_weights_gets_about_the_best_of_all_roundings() -> None:
    """Against all combinations of integers, in the metric of what the layer reads."""
    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1, groups=2)))
    student = quantize(model, QuantizationConfig(2, 8))
    layer = student.get_submodule("body.2")
    before = layer.weight.detach().clone()
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    calibrate(student, FACES, CalibrationConfig(equalize=False, correct_biases=False))
    hook.remove()
    values = torch.cat(seen).view(-1, 2, 4, *seen[0].shape[2:]).permute(1, 0, 3, 4, 2).flatten(1, 3)
    scale = layer.weight_fake_quant.scale.detach()
    for group in range(2):
        centered = values[group] - values[group].mean(0)

        def loss(weights: Tensor, group: int = group, centered: Tensor = centered) -> float:
            return float((centered @ (weights - before[group].flatten())).square().mean())

        choices = itertools.product(range(-1, 2), repeat=4)  # symmetric, of 2 bits
        best = min(loss(scale[group] * torch.tensor(choice, dtype=torch.float32)) for choice in choices)
        nearest = (before[group].flatten() / scale[group]).round().clamp(-1, 1) * scale[group]
        assert loss(layer.weight.detach()[group].flatten()) <= min(loss(nearest), 2 * best) + 1e-7


def test_a_layer_of_many_weights_is_rounded_by_its_samples() -> None:
    """48 x 10 x 10 inputs are more than second moments are kept of."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 48, 5, stride=3, padding=1), nn.PReLU(48), nn.Flatten(), nn.Linear(4800, 16))
    model = with_preprocessing(layers, SIZE).eval()
    x = SIZE(FACES)
    with torch.no_grad():
        expected = model(x)
        errors = []
        for gptq in (False, True):
            student = quantize(model, QuantizationConfig(8, 8, overrides={"3": LayerBits(weight=3)}))
            calibrate(student, FACES, CalibrationConfig(equalize=False, gptq=gptq)).eval()
            errors.append(float((student(x) - expected).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_large_layers_of_two_bits_gain_from_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that suit nearest rounding are too small where weights make up for each other's errors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4000, 64, generator=generator) @ torch.randn(64, 600, generator=generator)
    inputs += torch.randn(inputs.shape, generator=generator)
    found = statistics_for(1, 24, 600)
    found.add(inputs, torch.zeros(1, 4000, 24))
    losses = []
    for factors in ([1.0], gptq._SCALE_FACTORS):
        monkeypatch.setattr(gptq, "_SCALE_FACTORS", factors)
        torch.manual_seed(0)
        layer = QuantizedLinear(600, 24, weight_bits=2).eval()
        layer.weight_fake_quant.observe(layer.weight)
        layer.weight_fake_quant.set_range()
        weight = weight_of(layer)
        layer.weight.data.copy_(found.round(layer, weight)[0])
        losses.append(float((inputs.double() @ (weight_of(layer) - weight).mT).square().mean()))
    assert losses[1] < 0.95 * losses[0], losses


def test_a_layer_that_reads_nothing_does_no_harm() -> None:
    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    with torch.no_grad():
        model.body[0].weight.zero_()
        model.body[0].bias.fill_(-1)
    student = calibrate(quantize(model, 4), FACES)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
def test_inputs_that_hardly_vary_do_no_harm(spread: float) -> None:
    """What is left of their products without the mean may be nothing but rounding."""
    torch.manual_seed(0)
    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 512, 1), nn.Conv2d(512, 8, 1)))
    with torch.no_grad():
        model.body[0].weight.mul_(spread)
        model.body[0].bias.fill_(1)
    for count in (4, 64):
        student = quantize(model, QuantizationConfig(4, 8))
        calibrate(student, FACES[:count], CalibrationConfig(equalize=False))
        assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Linear(4, 6),
    ],
    ids=repr,
)
def test_patches_times_weights_are_outputs(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(5, 4) if isinstance(layer, nn.Linear) else torch.randn(5, 4, 9, 9)
    made = layer(x)
    made = made[:, :, None, None] if made.ndim == 2 else made
    positions = Positions.drawn(5, *made.shape[2:], 30, torch.Generator().manual_seed(0))
    groups = getattr(layer, "groups", 1)
    found = patches(layer, x, positions).view(len(positions.image), groups, -1)
    weights = layer.weight.view(groups, -1, found.shape[2])
    products = torch.einsum("mgk,gok->mgo", found, weights).flatten(1) + layer.bias
    expected = made[positions.image, :, positions.row, positions.column]
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-5)
