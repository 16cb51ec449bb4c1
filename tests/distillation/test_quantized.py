"""Distilling what the quantization package makes: the networks this package exists for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qface.distillation import distill
from qface.errors import TrainingError
from qface.provenance import provenance_of
from qface.quantization import LSQFakeQuantize, calibrate, quantize, scale_parameters
from tests.networks import RANGES_ONLY

from .networks import CPU, Interrupted, changed, face_images, same_weights, student_of
from .networks import tiny_teacher as teacher


def student() -> nn.Module:
    return student_of(teacher(), bits=4)


def student_rounded_to_nearest() -> nn.Module:
    """GPTQ on the 32 images that are trained on leaves nothing to repair there."""
    return calibrate(quantize(teacher(), 4), face_images().images, RANGES_ONLY)


def distance(first: nn.Module, second: nn.Module) -> float:
    images = face_images().images
    with torch.no_grad():
        cosines = nn.functional.cosine_similarity(first.eval()(images), second.eval()(images))
    return float(1 - cosines.mean())


def test_distillation_repairs_a_four_bit_student() -> None:
    quantized = student_rounded_to_nearest()
    before = distance(quantized, teacher())
    distill(quantized, teacher(), face_images(), changed(CPU, epochs=60), progress=False)
    assert distance(quantized, teacher()) < 0.8 * before


@pytest.mark.parametrize("rate", [0.0, None])
def test_scales_are_trained_unless_their_learning_rate_is_zero(rate: float | None) -> None:
    quantized = student()
    before = [scale.detach().clone() for scale in scale_parameters(quantized)]
    distill(quantized, teacher(), face_images(), changed(CPU, optimizer={"scale_learning_rate": rate}), progress=False)
    still = [torch.equal(old, new) for old, new in zip(before, scale_parameters(quantized), strict=True)]
    assert all(still) is (rate == 0.0)


@pytest.mark.parametrize(("observer_steps", "follow"), [(0, False), (2, True)])
def test_observers_follow_the_data_for_their_steps_and_end_off(observer_steps: int, follow: bool) -> None:
    quantized = student()
    before = [scale.detach().clone() for scale in scale_parameters(quantized)]
    config = changed(CPU, observer_steps=observer_steps, optimizer={"scale_learning_rate": 0.0})
    distill(quantized, teacher(), face_images(), config, progress=False)
    still = [torch.equal(old, new) for old, new in zip(before, scale_parameters(quantized), strict=True)]
    assert all(still) is not follow
    assert not any(module.observing for module in quantized.modules() if isinstance(module, LSQFakeQuantize))


@pytest.mark.parametrize("observer_steps", [0, 3])
@pytest.mark.parametrize("reads", [2, 4, 6])
def test_a_resumed_quantized_run_ends_with_the_same_weights(reads: int, observer_steps: int, tmp_path: Path) -> None:
    config = changed(CPU, observer_steps=observer_steps)
    straight, stopped, resumed = student(), student(), student()
    distill(straight, teacher(), face_images(), config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, teacher(), Interrupted(face_images(), reads), config, tmp_path, progress=False)
    distill(resumed, teacher(), face_images(), config, tmp_path, resume=True, progress=False)
    assert same_weights(straight, resumed)
    images = face_images().images
    with torch.no_grad():
        assert torch.equal(straight.eval()(images), resumed.eval()(images))


def test_the_student_remembers_how_it_was_distilled() -> None:
    quantized = distill(student(), teacher(), face_images(), CPU, progress=False)
    steps = provenance_of(quantized)
    assert [step["step"] for step in steps] == ["quantize", "calibrate", "distill"]
    assert steps[-1]["optimizer"]["learning_rate"] == 0.05
    copy.deepcopy(quantized)


def test_bfloat16_trains_too_and_quantizers_stay_exact() -> None:
    quantized = student_rounded_to_nearest()
    before = distance(quantized, teacher())
    distill(quantized, teacher(), face_images(), changed(CPU, epochs=60, precision="bf16"), progress=False)
    assert distance(quantized, teacher()) < 0.8 * before

    rounded: list[tuple[LSQFakeQuantize, torch.Tensor]] = []
    for quantizer in quantized.modules():
        if isinstance(quantizer, LSQFakeQuantize) and quantizer.num_channels is None:
            quantizer.register_forward_hook(lambda module, inputs, output: rounded.append((module, output)))
    with torch.autocast("cpu", torch.bfloat16):
        quantized.train()(face_images().images)
    assert rounded
    for quantizer, values in rounded:
        steps = values / quantizer.scale
        assert values.dtype is torch.float32
        assert (steps - steps.round()).abs().max() < 1e-3
        assert len(values.unique()) <= 2**quantizer.bits


def test_a_student_with_other_bits_does_not_go_on(tmp_path: Path) -> None:
    distill(student(), teacher(), face_images(), CPU, tmp_path, progress=False)
    other = student_of(teacher(), bits=3)
    with pytest.raises(TrainingError, match="other student"):
        distill(other, teacher(), face_images(), CPU, tmp_path, resume=True, progress=False)


def test_a_student_of_a_frozen_teacher_trains_as_a_whole() -> None:
    known = teacher()
    known.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in quantize(known, bits=4).parameters())
