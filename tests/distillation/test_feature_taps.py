"""The sums behind each block, as a student that was quantized and its teacher make them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qface.distillation import DistillConfig, LossConfig, OptimizerConfig, ScheduleConfig, distill
from qface.distillation.feature_taps import FeatureLoss
from qface.preprocessing import Preprocessing, with_preprocessing

from .networks import (
    WIDE,
    Interrupted,
    Residual,
    changed,
    face_images,
    log,
    residual_network,
    same_weights,
    student_of,
    tiny_teacher,
)

CONFIG = DistillConfig(
    batch_size=16,
    epochs=3,
    losses=LossConfig(feature_loss_weight=1.0),
    optimizer=OptimizerConfig(learning_rate=0.002),
    schedule=ScheduleConfig(warmup_steps=0),
    checkpoint_every=2,
    device="cpu",
    num_workers=0,
)
WITHOUT = changed(CONFIG, losses={"feature_loss_weight": 0.0})


class Shifted(Residual):
    """With a sum of constants, which is the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * (self.shift[:, :3] + self.shift[:, 3:6]))


def disturbed(student: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if name.endswith("weight"):
                value += 0.3 * value.std() * torch.randn(value.shape, generator=generator)
    return student


def losses(folder: Path) -> list[float | None]:
    return [record.get("feature") for record in log(folder)]


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.integers(0, 1000))
def test_factors_of_channels_are_found(factors: list[float], seed: int) -> None:
    wanted, others = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor(factors)[:, None, None]
    loss = FeatureLoss([(scale * wanted, wanted)])
    for images in (wanted, others):
        found = loss([(scale * images, images)])
        assert found.shape == (5, 1)
        assert float(found.max()) < 1e-9


def test_the_loss_is_the_noise_in_parts_of_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, noise = torch.randn(2, 64, 4, 8, 8, generator=generator)
    loss = FeatureLoss([(3 * wanted, wanted), (wanted, wanted)])
    made = [(3 * (wanted + 0.2 * noise), wanted), (wanted, wanted)]
    assert float(loss(made).mean()) == pytest.approx(0.2**2 / 2, rel=0.05)


def test_channels_that_are_never_active_lose_nothing() -> None:
    wanted = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted[:, 0] = 0
    for values in (wanted, torch.zeros_like(wanted)):
        assert FeatureLoss([(values, values)])([(values, values)]).eq(0).all()


def test_the_term_brings_the_sums_nearer(tmp_path: Path) -> None:
    ends = []
    for weight in (10.0, 1e-9):
        config = changed(
            CONFIG,
            epochs=40,
            losses={"feature_loss_weight": weight},
            optimizer={"learning_rate": 0.005},
            horizontal_flip=False,
        )
        folder, student = tmp_path / str(weight), disturbed(student_of(residual_network(), bits=8))
        distill(student, residual_network(), face_images(), config, folder, progress=False)
        found = [loss / weight for loss in losses(folder) if loss is not None]
        assert len(found) == 80
        ends.append(sum(found[-10:]))
    assert ends[0] < 0.5 * ends[1]


def test_the_term_falls_with_the_square_of_the_steps_that_are_left(tmp_path: Path) -> None:
    images = face_images()
    config = changed(
        CONFIG, epochs=4, batch_size=len(images), optimizer={"learning_rate": 1e-12}, horizontal_flip=False
    )
    distill(disturbed(student_of(residual_network())), residual_network(), images, config, tmp_path, progress=False)
    first, *others = [loss for loss in losses(tmp_path) if loss is not None]
    assert [loss / first for loss in others] == pytest.approx([9 / 16, 4 / 16, 1 / 16], rel=1e-3)


def test_sums_of_constants_are_not_compared(tmp_path: Path) -> None:
    teacher = with_preprocessing(Shifted(), Preprocessing(size=(8, 8), std=(20.0,) * 3))
    distill(student_of(teacher), teacher, face_images(), CONFIG, tmp_path, progress=False)
    assert None not in losses(tmp_path)


@pytest.mark.parametrize("reads", [2, 4])
def test_a_resumed_run_ends_with_the_same_weights(reads: int, tmp_path: Path) -> None:
    straight, stopped, resumed = (student_of(residual_network()) for _ in range(3))
    distill(straight, residual_network(), face_images(), CONFIG, progress=False)
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, residual_network(), Interrupted(face_images(), reads), CONFIG, tmp_path, progress=False)
    distill(resumed, residual_network(), face_images(), CONFIG, tmp_path, resume=True, progress=False)
    assert same_weights(straight, resumed)


OTHERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "other channels": lambda: (student_of(residual_network()), residual_network(width=6)),
    "student without sums": lambda: (student_of(tiny_teacher()), residual_network()),
    "teacher without sums": lambda: (student_of(residual_network()), tiny_teacher()),
    "float student": lambda: (residual_network(0), residual_network(1)),
}


@pytest.mark.parametrize("networks", OTHERS.values(), ids=OTHERS)
def test_networks_without_common_sums_train_as_if_there_were_no_such_term(
    networks: Callable[[], tuple[nn.Module, nn.Module]], tmp_path: Path
) -> None:
    student, teacher = networks()
    other = copy.deepcopy(student)
    distill(student, teacher, face_images(), CONFIG, tmp_path, progress=False)
    distill(other, teacher, face_images(), WITHOUT, progress=False)
    assert losses(tmp_path) == [None] * 6
    assert same_weights(student, other)


def test_a_teacher_that_cannot_be_traced_teaches_its_embedding_alone(tmp_path: Path) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = residual_network()
            with_preprocessing(self, WIDE)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images) if images.sum() > -1e9 else images

    distill(student_of(residual_network()), Untraceable(), face_images(), CONFIG, tmp_path, progress=False)
    assert losses(tmp_path) == [None] * 6


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind_in_the_networks(fails: bool) -> None:
    student, teacher = student_of(residual_network()), residual_network()
    before = teacher.state_dict()
    images = Interrupted(face_images(), reads=4 if fails else 99)
    try:
        distill(student, teacher, images, CONFIG, progress=False)
    except KeyboardInterrupt:
        assert fails
    assert not any(layer._forward_hooks for network in (student, teacher) for layer in network.modules())
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
