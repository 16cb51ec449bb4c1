from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qface
from qface.data import ImageFolder
from qface.distillation import DistillConfig, LossConfig, OptimizerConfig, distill
from qface.distillation.pseudo_labels import pseudo_labels
from qface.errors import ConfigError
from qface.evaluation import embed
from qface.preprocessing import with_preprocessing
from tests.distillation.networks import WIDE, changed, face_images, same_weights, tiny_network

SETTINGS = DistillConfig(
    device="cpu",
    batch_size=8,
    max_steps=3,
    losses=LossConfig(embedding_loss=None, ekd_weight=1.0),
    optimizer=OptimizerConfig(learning_rate=0.002),
)


def people(
    sizes: list[int], spread: float, seed: int, dimensions: int = 64, orthogonal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around a random direction for each person, shuffled, and who is who."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centers = random.normal(size=(len(sizes), dimensions))
    if orthogonal:
        centers = dimensions**0.5 * np.linalg.qr(centers.T)[0].T
    rows = centers[labels] + spread * random.normal(size=(len(labels), dimensions))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


@given(st.lists(st.integers(1, 8), min_size=20, max_size=40), st.integers(0, 100))
def test_people_who_are_far_from_each_other_are_told_apart(sizes: list[int], seed: int) -> None:
    embeddings, labels = people(sizes, 0.2, seed, orthogonal=True)
    found = pseudo_labels(embeddings).numpy()
    assert np.array_equal(found[:, None] == found, labels[:, None] == labels)
    assert found.min() == 0 and found.max() == len(np.unique(labels)) - 1


def test_a_few_people_of_many_images_do_not_look_more_distinct_than_people_can_be() -> None:
    # Most pairs are of the last seven people, 21 cosines over and over; in this draw of a hundred those are so
    # near to 0 that two others, at 0.46, looked like one person.
    embeddings, labels = people([1] * 10 + [4, 7, 3] + [8] * 7, 0.2, seed=78)
    found = pseudo_labels(embeddings).numpy()
    assert np.array_equal(found[:, None] == found, labels[:, None] == labels)


def test_strangers_stay_strangers() -> None:
    embeddings, _ = people([1] * 500, 0.0, 0)
    assert len(pseudo_labels(embeddings).unique()) == 500


def test_one_image_is_one_person() -> None:
    assert pseudo_labels(np.ones((1, 1), np.float32)).tolist() == [0]


def test_real_faces(faces: Path) -> None:
    teacher = qface.load(faces / "weights" / "mobilefacenet_112x96.safetensors")
    folder = ImageFolder(faces / "data" / "lfw", identities="first-half")
    assert folder.labels is not None
    chosen = range(0, 400)
    found, labels = pseudo_labels(embed(teacher, qface.data.TensorImages(folder.read(chosen)))), folder.labels[:400]
    upper = torch.ones(400, 400).triu(1).bool()
    together, true = (found[:, None] == found)[upper], (labels[:, None] == labels)[upper]
    assert true[together].float().mean() > 0.99
    assert together[true].float().mean() > 0.8


# ---- training

# Its embedding is the image, so that images of one person lie close to each other.
TEACHER = with_preprocessing(nn.Flatten(), WIDE)


def trained(images: qface.data.TensorImages | Tensor, config: DistillConfig = SETTINGS) -> nn.Module:
    return distill(tiny_network(0), copy.deepcopy(TEACHER), images, config, progress=False)


def test_without_labels_training_is_what_it_is_with_them() -> None:
    images = face_images()
    assert same_weights(trained(images.images), trained(images))
    assert not same_weights(trained(images.images, changed(SETTINGS, losses={"pseudo_pairs": False})), trained(images))


def test_the_original_ekd_finds_its_positives_without_labels() -> None:
    trained(face_images().images, changed(SETTINGS, losses={"reference_ekd": True}))
    with pytest.raises(ConfigError, match="reference_ekd"):
        trained(face_images().images, changed(SETTINGS, losses={"reference_ekd": True, "pseudo_pairs": False}))
