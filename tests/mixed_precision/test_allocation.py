"""``allocate_bits``: the file keeps the budget, and bits go where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qface
from qface.errors import ConfigError, ImagesError
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import QuantizationConfig
from tests.networks import foreign_net, random_faces, tiny_face_net

SIZE = Preprocessing(size=(48, 48), std=(128.0,) * 3)
FACES = random_faces(8)


class Wide(nn.Module):
    """Three wide layers; the embedding does not depend on the one in the middle but for a ten-thousandth."""

    def __init__(self, dim: int = 16, size: tuple[int, int] = SIZE.size) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 8, stride=8)
        self.idle = nn.Conv2d(64, 64, 3, padding=1)
        self.busy = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64 * (size[0] // 8) * (size[1] // 8), dim)
        with torch.no_grad():
            self.idle.weight.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((self.idle(x) + self.busy(x)).flatten(1))  # type: ignore[no-any-return]


def network(make: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return with_preprocessing(make(size=SIZE.size).eval(), SIZE)


def file_bytes(model: nn.Module, config: QuantizationConfig, folder: Path) -> int:
    student = qface.calibrate(qface.quantize(model, config), FACES)
    return qface.export(student, folder / "student.onnx").stat().st_size


def bit_widths(model: nn.Module, config: QuantizationConfig) -> dict[str, int]:
    table = (name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    return {name: config.weight_bits_of(name) for name in table}


@pytest.fixture(scope="module")
def extremes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[..., nn.Module]], list[int]]:
    """Bytes of the files of a network at 2 and at 8 bits."""
    folder = tmp_path_factory.mktemp("extremes")
    return cache(lambda make: [file_bytes(network(make), QuantizationConfig(bits), folder) for bits in (2, 8)])


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizationConfig, float]:
    """Return the bits chosen for :class:`Wide` where all weights at 4 bits would fit, and that budget in MB."""
    model = network(Wide)
    budget = file_bytes(model, QuantizationConfig(4), tmp_path_factory.mktemp("tight")) / 1e6
    return qface.allocate_bits(model, FACES, budget), budget


@pytest.mark.parametrize(
    ("make", "between"), [(tiny_face_net, 0.02), (tiny_face_net, 0.6), (foreign_net, 0.3), (Wide, 0.3)]
)
def test_the_file_keeps_the_budget(
    make: Callable[..., nn.Module],
    between: float,
    extremes: Callable[[Callable[..., nn.Module]], list[int]],
    tmp_path: Path,
) -> None:
    model = network(make)
    smallest, largest = extremes(make)
    budget = (smallest + 2048 + between * (largest - smallest)) / 1e6
    found = file_bytes(model, qface.allocate_bits(model, FACES, budget), tmp_path)
    assert found <= budget * 1e6
    if make is Wide:  # enough weights that the nodes which unpack them do not decide
        assert found > 0.9 * budget * 1e6


def test_a_tight_budget_takes_bits_from_the_layer_that_needs_least(tight: tuple[QuantizationConfig, float]) -> None:
    chosen = bit_widths(network(Wide), tight[0])
    assert chosen["idle"] < 4 <= chosen["busy"]


def test_with_room_for_all_of_it_nothing_is_saved_that_matters() -> None:
    model = network(tiny_face_net)
    assert set(bit_widths(model, qface.allocate_bits(model, FACES, 1)).values()) <= {7, 8}


def test_the_rest_of_the_config_is_as_it_was_asked_for() -> None:
    config = qface.allocate_bits(network(Wide), FACES, 0.1, activation_bits=5)
    assert config.activation_bits == 5
    assert all(bits.activation is None and bits.weight != config.weight_bits for bits in config.overrides.values())


def test_a_loader_is_read_once() -> None:
    config = qface.allocate_bits(network(tiny_face_net), iter([SIZE(FACES)]), 0.02)
    assert isinstance(config, QuantizationConfig)


def test_a_distilled_student_still_fits(tight: tuple[QuantizationConfig, float], tmp_path: Path) -> None:
    model = network(Wide)
    config, budget = tight
    student = qface.calibrate(qface.quantize(model, config), FACES)
    qface.distill(student, model, FACES, qface.DistillConfig(epochs=1, batch_size=8))
    assert qface.export(student, tmp_path / "student.onnx").stat().st_size <= budget * 1e6


def test_too_small_a_budget_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    model = network(tiny_face_net)
    with pytest.raises(ConfigError, match=r"budget_mb must be >= 0\.\d+, .*got 0\.001") as refusal:
        qface.allocate_bits(model, FACES, 0.001)
    needed = float(str(refusal.value).split(">= ")[1].split(",")[0])
    assert set(bit_widths(model, qface.allocate_bits(model, FACES, needed + 0.001)).values()) <= {2, 3, 4}


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_what_is_no_budget_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match="budget_mb must be a number > 0"):
        qface.allocate_bits(network(tiny_face_net), FACES, budget)


@pytest.mark.parametrize("images", ["absent", None, []])
def test_images_that_are_missing_are_refused(images: Any) -> None:
    with pytest.raises(ImagesError):
        qface.allocate_bits(network(tiny_face_net), images, 1)


def test_students_and_impossible_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="already"):
        qface.allocate_bits(qface.quantize(network(tiny_face_net)), FACES, 1)
    with pytest.raises(ConfigError, match=r"activation_bits must be .* got 9"):
        qface.allocate_bits(network(tiny_face_net), FACES, 1, activation_bits=9)
