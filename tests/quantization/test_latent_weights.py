"""Weights that move with their scales and towards their integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from qface.quantization import WeightFakeQuantize, calibrate, pull_to_integers, quantize, weights_follow_scales
from qface.quantization.quantized_layers import WeightedLayer
from tests.networks import random_faces, tiny_face_net


def moved_student(bits: int) -> tuple[fx.GraphModule, list[nn.Module]]:
    """Return a student whose weights lie anywhere between integers, and its layers."""
    student = calibrate(quantize(tiny_face_net(), bits), random_faces(8)).train()
    layers = [layer for layer in student.modules() if isinstance(layer, WeightedLayer)]
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(1 + 0.2 * torch.randn_like(layer.weight))
    return student, layers


def integers(layers: list[nn.Module]) -> list[Tensor]:
    return [layer.weight_fake_quant.integers(layer.weight) for layer in layers]  # type: ignore[operator]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_alone_change_no_integer(bits: int) -> None:
    student, layers = moved_student(bits)
    before = integers(layers)
    with torch.no_grad(), weights_follow_scales(student):
        for layer in layers:
            layer.weight_fake_quant.scale.mul_(torch.rand_like(layer.weight_fake_quant.scale) + 0.5)
    changed = [(one != other).float().mean() for one, other in zip(before, integers(layers), strict=True)]
    assert max(changed) < 0.01  # one of many may lie at a tie


def test_scales_that_a_step_makes_negative_do_no_harm() -> None:
    student, layers = moved_student(4)
    with torch.no_grad(), weights_follow_scales(student):
        layers[0].weight_fake_quant.scale[0] = -1.0  # type: ignore[index, union-attr]
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert layers[0].weight_fake_quant.scale.min() > 0  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_pull_leaves_integers_and_shortens_distances(share: float) -> None:
    student, layers = moved_student(4)
    before, weights = integers(layers), [layer.weight.detach().clone() for layer in layers]
    values = [layer.weight_fake_quant.rounded(weight) for layer, weight in zip(layers, weights, strict=True)]
    pull_to_integers(student, share)
    for layer, weight, value in zip(layers, weights, values, strict=True):
        torch.testing.assert_close(layer.weight - value, (1 - share) * (weight - value), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(before, integers(layers), strict=True))


def test_networks_without_quantized_layers_do_not_change() -> None:
    network = tiny_face_net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with weights_follow_scales(network):
        pull_to_integers(network, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_step_on_scales_moves_weights_as_far_as_one_on_weights() -> None:
    """Along a channel's own direction, for gradient descent at one rate."""
    torch.manual_seed(0)
    quantizer = WeightFakeQuantize(4, 3).train()
    quantizer.set_qparams(torch.tensor([0.1, 0.2, 0.3]), quantizer.zero_point)
    weight, gradient = torch.randn(3, 5), torch.randn(3, 5)
    quantizer(weight).backward(gradient)
    values, whole = quantizer.rounded(weight), quantizer.integers(weight)
    direction = values / values.norm(dim=1, keepdim=True)
    along = (gradient * direction).sum(1)  # how far descent on the weights moves them
    moved = quantizer.scale.grad * whole.norm(dim=1)  # type: ignore[operator]
    torch.testing.assert_close(moved, along, rtol=1e-4, atol=1e-5)
