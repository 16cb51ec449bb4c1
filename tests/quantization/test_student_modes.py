"""Deployed and simulated mode of a student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qface.quantization import CalibrationConfig, calibrate, quantize
from qface.quantization.student_modes import simulated_mode
from tests.networks import foreign_net, random_faces, tiny_face_net
from tests.quantization.test_cross_layer_equalization import images, sized

FACES = random_faces(32)


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_simulated_embeddings_are_those_of_the_file_up_to_float_noise(make: Callable[..., nn.Module]) -> None:
    student = calibrate(quantize(sized(make), 8), FACES, CalibrationConfig(gptq=False)).eval()
    x = images(8, seed=3)
    with torch.no_grad():
        deployed = student(x)
        with simulated_mode(student):
            simulated = student(x)
        again = student(x)
    assert torch.equal(deployed, again)
    assert not torch.equal(deployed, simulated)
    assert torch.cosine_similarity(deployed, simulated).min() > 0.999


def test_only_quantized_layers_are_simulated() -> None:
    """Dropout and batch norms in training mode would compute something else."""
    model = nn.Sequential(sized(tiny_face_net), nn.BatchNorm1d(16), nn.Dropout()).eval()
    with simulated_mode(model):
        assert not any(module.training for module in model.modules())
    student = calibrate(quantize(sized(tiny_face_net), 6), FACES, CalibrationConfig(gptq=False)).eval()
    before = [module.training for module in student.modules()]
    with simulated_mode(student):
        assert any(module.training for module in student.modules())
    assert [module.training for module in student.modules()] == before
