"""``evaluate_stress`` against the same comparisons made with public parts, one condition at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qface.data.images import TensorImages
from qface.data.stress import StressedImages
from qface.errors import ConfigError, ImagesError
from qface.evaluation import embed, evaluate_stress, tpr_at_fpr
from qface.evaluation.embedding import as_embedder
from qface.evaluation.stress_evaluation import STRESS_FPRS
from tests.networks import random_faces


class Pooled(nn.Module):
    """Embeds an image as the means of its cells."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, self.cells).flatten(1)


def people(count: int = 90) -> TensorImages:
    """Two images of each person; enough impostor pairs for a rate of 1e-3."""
    faces = random_faces(count, seed=0).repeat_interleave(2, 0).float()
    noise = 60 * torch.randn(faces.shape, generator=torch.Generator().manual_seed(1))
    return TensorImages((faces + noise).clamp(0, 255).byte(), torch.arange(count).repeat_interleave(2))


def test_changed_faces_meet_faces_as_they_are() -> None:
    images, model, reference = people(), Pooled(5), Pooled(8)
    result = evaluate_stress(model, images, reference=reference, conditions=["masked", "small"], bootstrap=20)
    assert [each.condition for each in result.figures] == ["none", "masked", "small"]
    assert (result.images, result.identities, result.bootstrap) == (180, 90, 20)
    for each in result.figures:
        faces = images if each.condition == "none" else StressedImages(images, each.condition)
        for network, tprs in ((model, each.tpr_at_fpr), (reference, each.reference_tpr_at_fpr)):
            gallery, probes = (embed(as_embedder(network), source) for source in (images, faces))
            expected = tpr_at_fpr(probes, images.labels, STRESS_FPRS, gallery)
            assert tprs == {fpr: point.tpr for fpr, point in expected.items()}
        assert each.tpr_at_fpr["1e-3"] is not None and each.drops["1e-3"] is not None
        assert each.drops["1e-3"].drop == pytest.approx(each.reference_tpr_at_fpr["1e-3"] - each.tpr_at_fpr["1e-3"])
        assert each.drops["1e-5"] is None and each.accuracy is None and each.cosine is None


class Counting(Pooled):
    """Counts the images that it embeds."""

    images = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return super().forward(images)


def test_a_model_beside_itself_loses_nothing_and_embeddings_are_kept(tmp_path: Path) -> None:
    images, model, folder = people(30), Counting(5), tmp_path / "run"
    first = evaluate_stress(model, images, reference=Pooled(5), conditions=["dark"], run_dir=folder)
    assert [each.cosine for each in first.figures] == pytest.approx([1, 1])
    assert model.images >= 2 * len(images)
    model.images = 0
    assert evaluate_stress(model, images, reference=Pooled(5), conditions=["dark"], run_dir=folder) == first
    assert model.images < len(images)  # a few of each condition, to see that the model is the same


def test_what_cannot_be_judged_is_refused() -> None:
    images = people(4)
    with pytest.raises(ConfigError, match="needs a reference to compare with"):
        evaluate_stress(Pooled(5), images, bootstrap=5)
    with pytest.raises(ConfigError, match="condition must be one of"):
        evaluate_stress(Pooled(5), images, conditions=["upside-down"])
    with pytest.raises(ImagesError, match="labeled images"):
        evaluate_stress(Pooled(5), images.images)
