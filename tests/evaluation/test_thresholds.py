from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qface.data import TensorImages
from qface.errors import ConfigError, ImagesError
from qface.evaluation import operating_thresholds, rates_at, tpr_at_fpr
from qface.preprocessing import Preprocessing
from tests.conftest import Crops


class Corner(nn.Module):
    """Embeds an image as its first pixels, blurred by ``noise`` that depends on the image alone."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.preprocessing = Preprocessing(std=(12.0,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        corner, other = x[:, :, :2, :4].flatten(1), x[:, :, 2:4, :4].flatten(1)
        return corner + self.noise * other


def people(count: int = 60, each: int = 4) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    faces = torch.randn(count, 1, 3, 8, 8, generator=generator)
    images = faces + 0.7 * torch.randn(count, each, 3, 8, 8, generator=generator)
    return TensorImages(images.flatten(0, 1), torch.arange(count).repeat_interleave(each))


def unit(x: Tensor) -> np.ndarray:
    return nn.functional.normalize(x).numpy()


def test_each_pairing_has_its_own_threshold_and_says_what_floats_would_do() -> None:
    images, teacher, student = people(), Corner(), Corner(noise=0.5)
    assert images.labels is not None
    labels = images.labels.numpy()
    result = operating_thresholds(student, teacher, images, "1e-2")
    teachers, students = unit(teacher(images.images)), unit(student(images.images))
    pairings = {"float": (teachers, None), "quantized": (students, None), "mixed": (students, teachers)}
    float_threshold = tpr_at_fpr(teachers, labels, ["1e-2"])["1e-2"].threshold
    assert float_threshold is not None
    assert [row.pairing for row in result.pairings] == list(pairings)
    for row, (probes, gallery) in zip(result.pairings, pairings.values(), strict=True):
        point = tpr_at_fpr(probes, labels, ["1e-2"], gallery)["1e-2"]
        assert point.threshold is not None
        assert row.threshold == pytest.approx(point.threshold, abs=1e-6)
        assert row.rates is not None and row.rates_at_float is not None
        assert row.rates.tpr == pytest.approx(point.tpr, abs=0.01)
        wanted = rates_at(float_threshold, probes, labels, gallery)
        assert row.rates_at_float.fpr == pytest.approx(wanted.fpr, abs=1e-3)
    assert result.to_dict()["pairings"][2]["pairing"] == "mixed"


def test_a_rate_with_too_few_pairs_has_no_threshold() -> None:
    result = operating_thresholds(Corner(0.5), Corner(), people(count=10), "1e-5")
    assert all((row.threshold, row.rates, row.rates_at_float) == (None, None, None) for row in result.pairings)


def test_thresholds_are_judged_on_other_people(crops: Crops) -> None:
    folder = crops({f"Person {number}": 3 for number in range(12)})
    models = (Corner(0.5), Corner())
    same = operating_thresholds(*models, folder, "0.1", identities="first-half")
    other = operating_thresholds(*models, folder, "0.1", identities="first-half", eval_identities="second-half")
    assert [row.threshold for row in same.pairings] == [row.threshold for row in other.pairings]
    assert (same.eval_identities, other.eval_identities) == ("first-half", "second-half")
    assert [row.rates for row in same.pairings] != [row.rates for row in other.pairings]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="labeled images"):
        operating_thresholds(Corner(), Corner(), people().images)
    with pytest.raises(ConfigError, match="false-positive rate"):
        operating_thresholds(Corner(), Corner(), people(), "2")


def test_errors_come_before_any_embedding(crops: Crops) -> None:
    class Unused(Corner):
        def __call__(self, batch: Tensor) -> Tensor:
            raise AssertionError("embedded")

    folder = crops({f"Person {number}": 3 for number in range(12)})
    with pytest.raises(ConfigError, match="false-positive rate"):
        operating_thresholds(Unused(), Unused(), folder, "1e-4x")
    with pytest.raises(ImagesError, match="does not exist"):
        operating_thresholds(Unused(), Unused(), folder, "0.1", eval_identities="nobody.txt")
