"""Images made from a network's statistics have them, and belong to one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import qface
from qface import SynthesisConfig
from qface.data.sources import as_image_source
from qface.data.synthetic import synthetic_crops
from qface.errors import ConfigError, TrainingError, UnsupportedLayerError
from qface.preprocessing import preprocessing_of
from qface.synthesis.statistics_loss import recorded_statistics
from tests.networks import random_faces, tiny_face_net

CONFIG = SynthesisConfig(num_images=10, num_steps=60, batch_size=8)


def dark_images() -> torch.Tensor:
    return random_faces(64) // 4


def trained() -> nn.Module:
    """A network whose BatchNorm layers have the statistics of dark images."""
    network = tiny_face_net(size=(112, 112))
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.train().momentum = None  # the mean of all batches
    with torch.no_grad():
        network(preprocessing_of(network)(dark_images()))
    return network.eval()


def pixels_in(folder: Path) -> torch.Tensor:
    source = as_image_source(folder)
    return source.read(range(len(source)))


def difference(network: nn.Module, images: torch.Tensor) -> float:
    with recorded_statistics(network) as statistics, torch.no_grad():
        network(preprocessing_of(network)(images))
        return float(statistics.take())


def test_images_have_the_statistics_of_the_network(tmp_path: Path) -> None:
    network = trained()
    folder = qface.synthesize(network, tmp_path / "made", CONFIG)
    made = pixels_in(folder)
    assert made.shape == (10, 3, 112, 112)
    noise = difference(network, synthetic_crops(8))
    assert difference(network, made[:8]) < noise / 2
    assert difference(network, dark_images()) < noise / 100


def test_no_image_is_like_another(tmp_path: Path) -> None:
    made = pixels_in(qface.synthesize(trained(), tmp_path / "made", CONFIG)).float().flatten(1)
    distances = torch.cdist(made, made) + 1e9 * torch.eye(len(made))
    assert distances.min() > 1000  # a fifth of the range in every value gives 10,000


def test_the_network_is_unchanged(tmp_path: Path) -> None:
    network = trained().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    qface.synthesize(network, tmp_path / "made", replace(CONFIG, num_steps=2))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_a_stopped_run_continues_to_the_same_images(tmp_path: Path) -> None:
    config = replace(CONFIG, num_steps=3)
    whole, stopped = (qface.synthesize(trained(), tmp_path / name, config) for name in ("whole", "stopped"))
    for name in ("00003.png", "00009.png"):
        (stopped / name).unlink()
    qface.synthesize(trained(), stopped, config)
    assert torch.equal(pixels_in(whole), pixels_in(stopped))
    assert {path.name for path in whole.glob("*.png")} == {path.name for path in stopped.glob("*.png")}


def test_a_folder_takes_one_run(tmp_path: Path) -> None:
    config = replace(CONFIG, num_steps=1)
    qface.synthesize(trained(), tmp_path, config)
    with pytest.raises(ConfigError, match="run with different settings"):
        qface.synthesize(trained(), tmp_path, replace(config, seed=1))
    with pytest.raises(ConfigError, match="run with different weights"):
        qface.synthesize(tiny_face_net(size=(112, 112)), tmp_path, config)


def test_a_student_calibrates_on_them(tmp_path: Path) -> None:
    network = trained()
    folder = qface.synthesize(network, tmp_path / "made", CONFIG)
    student, images = qface.calibrate(qface.quantize(network, 8), folder), random_faces(8, seed=5)
    inputs = preprocessing_of(network)(images)
    with torch.no_grad():
        cosines = torch.cosine_similarity(network.eval()(inputs), student.eval()(inputs))
    assert np.median(cosines) > 0.99


def test_a_network_without_statistics_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with pytest.raises(UnsupportedLayerError, match="no BatchNorm with running statistics"):
        qface.synthesize(network, tmp_path / "made", CONFIG)
    assert not (tmp_path / "made").exists()


def test_broken_statistics_are_refused(tmp_path: Path) -> None:
    network = trained()
    next(each for each in network.modules() if isinstance(each, nn.BatchNorm2d)).running_mean.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN or infinite"):
        qface.synthesize(network, tmp_path / "made", replace(CONFIG, num_steps=2))
    assert not list((tmp_path / "made").glob("*.png"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_images": 0},
        {"num_steps": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"smoothness": -1.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SynthesisConfig(**settings)  # type: ignore[arg-type]


def test_images_are_readable_files(tmp_path: Path) -> None:
    folder = qface.synthesize(trained(), tmp_path / "made", replace(CONFIG, num_images=2, num_steps=1))
    with Image.open(folder / "00001.png") as image:
        assert (image.size, image.mode) == ((112, 112), "RGB")
