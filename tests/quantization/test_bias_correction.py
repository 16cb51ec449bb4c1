"""Means of channels that rounding shifted, and biases that bring them back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qface.quantization import CalibrationConfig, calibrate, quantize
from qface.quantization.bias_correction import channel_means, correct_biases
from qface.quantization.fake_quantize import quantizers
from tests.networks import foreign_net, random_faces, tiny_face_net
from tests.quantization.test_cross_layer_equalization import floating, images, sized

UNCORRECTED = CalibrationConfig(equalize=False, correct_biases=False)


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_every_channel_gets_back_its_mean(make: Callable[..., nn.Module], bits: int) -> None:
    model = sized(make)
    batch = images(16)
    wanted = channel_means(floating(model, bits), batch)
    student = calibrate(quantize(model, bits), random_faces(16), UNCORRECTED).eval()
    before = channel_means(student, batch)
    weights = [layer.weight.clone() for layer in student.modules() if hasattr(layer, "weight_fake_quant")]
    correct_biases(student, batch, wanted)
    after = channel_means(student, batch)

    def distance(found: dict[str, torch.Tensor]) -> float:
        return float(sum((found[name] - wanted[name]).abs().mean() for name in wanted))

    assert distance(after) < 0.7 * distance(before)  # what a layer makes is rounded too
    found = [layer.weight for layer in student.modules() if hasattr(layer, "weight_fake_quant")]
    assert all(torch.equal(one, other) for one, other in zip(weights, found, strict=True))


def test_only_a_new_student_is_corrected() -> None:
    student = calibrate(quantize(tiny_face_net(), 4), random_faces(8))
    biases = {name: value.clone() for name, value in student.named_parameters() if name.endswith("bias")}
    calibrate(student, random_faces(8, seed=1))
    assert all(torch.equal(value, dict(student.named_parameters())[name]) for name, value in biases.items())
    assert all(quantizer.calibrated for quantizer in quantizers(student))


def test_it_brings_the_embeddings_closer() -> None:
    faces, held_out = random_faces(64), images(16, seed=5)
    model = sized(tiny_face_net)
    losses = []
    with torch.no_grad():
        for correct in (False, True):
            student = calibrate(quantize(model, 3), faces, CalibrationConfig(correct_biases=correct))
            losses.append(float((student.eval()(held_out) - model(held_out)).square().mean()))
    assert losses[1] < losses[0]


def test_batches_count_alike() -> None:
    """What two batches ask for is what both together do, but for rounding."""
    model, batch = sized(tiny_face_net), images(16)
    biases = []
    for batches in ([batch], [batch[:8], batch[8:]]):
        student = calibrate(quantize(model, 8), random_faces(16), UNCORRECTED).eval()
        for number, part in enumerate(batches, 1):
            correct_biases(student, part, channel_means(floating(model, 8), part), number)
        biases.append(torch.cat([v for name, v in student.named_parameters() if name.endswith("bias")]))
    assert torch.allclose(biases[0], biases[1], atol=0.01)
