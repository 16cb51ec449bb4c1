"""Tiny networks and images that all tests of this folder share."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qface.data.images import IndexedImages, TensorImages
from qface.distillation import DistillConfig, LossConfig, OptimizerConfig, ScheduleConfig
from qface.model_digest import digest_of_structure, digest_of_values
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import calibrate, quantize

WIDE = Preprocessing(size=(8, 8), std=(20.0,) * 3)
"""That of all networks here: its floats reach from -6.4 to 6.4, as far as :func:`face_images`."""

CPU = DistillConfig(
    batch_size=16,
    epochs=3,
    losses=LossConfig(ekd_weight=0.1, feature_loss_weight=0.0),
    optimizer=OptimizerConfig("sgd", learning_rate=0.05),
    schedule=ScheduleConfig(warmup_steps=0),
    checkpoint_every=2,
    device="cpu",
    num_workers=0,
)
"""With EKD, by SGD: what most tests train with. No workers, so that sources that count their reads work."""


def changed(config: DistillConfig, **fields: Any) -> DistillConfig:
    """``config`` with other values; a dictionary changes some fields of losses, optimizer or schedule."""
    parts = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return replace(config, **parts)


def tiny_network(seed: int, size: int = 8) -> nn.Module:
    """A convolution, a batch norm, a dropout and an embedding of ``size`` values, of a [N, 3, 8, 8] image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(72, size),
        )
    return with_preprocessing(network, WIDE)


def tiny_teacher() -> nn.Module:
    return tiny_network(1)


class Residual(nn.Module):
    """Two blocks with a sum behind each; ``width`` channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.activations = nn.ModuleList(nn.PReLU(width) for _ in range(2))
        self.embedding = nn.Linear(width * 16, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block, activation in zip(self.blocks, self.activations, strict=True):
            x = x + activation(block(x))
        return self.embedding(x.flatten(1))


def residual_network(seed: int = 1, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_preprocessing(Residual(width), WIDE)


def face_images(people: int = 8, each: int = 4, seed: int = 0, **options: Any) -> TensorImages:
    """Float images [people * each, 3, 8, 8], alike within a person, with labels."""
    generator = torch.Generator().manual_seed(seed)
    faces = torch.randn(people, 1, 3, 8, 8, generator=generator, **options)
    noise = torch.randn(people, each, 3, 8, 8, generator=generator, **options)
    return TensorImages((faces + noise).flatten(0, 1), torch.arange(people).repeat_interleave(each))


_STUDENTS: dict[tuple[str, str, int, bool], nn.Module] = {}


def student_of(teacher: nn.Module, bits: int = 3) -> nn.Module:
    """A calibrated student of ``teacher``: a copy of one that is made once for all equal teachers."""
    key = (digest_of_structure(teacher), digest_of_values(teacher), bits, teacher.training)
    if key not in _STUDENTS:
        _STUDENTS[key] = calibrate(quantize(teacher, bits), face_images().images)
    return copy.deepcopy(_STUDENTS[key])


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Interrupted(IndexedImages):
    """Raises at one of its reads, of which the first is the example."""

    def __init__(self, images: IndexedImages, reads: int) -> None:
        self.images, self.labels, self.reads = images, images.labels, reads

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return self.images.read(indices)

    def content(self, index: int) -> bytes:
        return self.images.content(index)
