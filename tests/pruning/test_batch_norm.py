"""Batch norms measured again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qface
from qface.pruning.batch_norm import reestimate_batch_norms
from qface.pruning.pruning_config import PruningConfig
from tests.networks import TinyFaceNet, random_faces, tiny_face_net


def test_statistics_are_those_of_the_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    images = 3 + 2 * torch.randn(128, 3, 6, 6)
    reestimate_batch_norms(model, images)
    first, second = model[1], model[4]
    made = model[0](images)
    torch.testing.assert_close(first.running_mean, made.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.running_var, made.var((0, 2, 3)), rtol=2e-2, atol=1e-3)
    behind = torch.relu(first(made))
    torch.testing.assert_close(second.running_mean, behind.mean((0, 2, 3)), rtol=2e-2, atol=1e-2)
    assert first.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_statistics_do_not_depend_on_those_before() -> None:
    one, other = tiny_face_net(), tiny_face_net()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(5)
    images = torch.randn(16, 3, 112, 112)
    reestimate_batch_norms(one, images)
    reestimate_batch_norms(other, images)
    torch.testing.assert_close(one(images), other(images))


def test_a_network_without_batch_norms_stays(tmp_path) -> None:
    model = nn.Conv2d(3, 4, 1)
    before = model.weight.clone()
    reestimate_batch_norms(model, torch.randn(2, 3, 4, 4))
    assert torch.equal(model.weight, before)


def distance(one: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float(1 - torch.cosine_similarity(one(images), other(images)).mean())


@pytest.mark.parametrize("repair", [False, True])
def test_pruning_can_measure_them(repair: bool) -> None:
    teacher: TinyFaceNet = tiny_face_net()
    faces = random_faces(64)
    reestimate_batch_norms(teacher, qface.Preprocessing()(faces))  # as training would have left them
    config = PruningConfig(repair=repair, reestimate=True)
    kept = PruningConfig(repair=repair)
    pruned = qface.prune(teacher, 0.4, faces, config)
    plain = qface.prune(teacher, 0.4, faces, kept)
    changed = [
        name
        for (name, one), other in zip(pruned.named_buffers(), plain.buffers(), strict=True)
        if "running" in name and not torch.equal(one, other)
    ]
    assert changed
    if not repair:
        images = qface.Preprocessing()(random_faces(32, seed=1))
        assert distance(pruned, teacher, images) < distance(plain, teacher, images)
