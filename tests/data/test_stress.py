"""The conditions of the stress protocol: the same change of an image wherever and whenever it is read."""

from __future__ import annotations

import pytest
import torch

from qface.data.images import TensorImages
from qface.data.stress import STRESS_CONDITIONS, StressedImages
from qface.errors import ConfigError, ImagesError
from tests.networks import random_faces

FACES = TensorImages(random_faces(6, seed=3), torch.tensor([0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize("condition", STRESS_CONDITIONS)
def test_an_image_is_changed_alike_in_any_order(condition: str) -> None:
    stressed = StressedImages(FACES, condition)
    assert len(stressed) == 6 and stressed.labels is FACES.labels
    found = stressed.read([4, 1])
    assert found.dtype == torch.uint8 and found.shape == (2, 3, 112, 112)
    assert torch.equal(found, torch.cat([StressedImages(FACES, condition).read([index]) for index in (4, 1)]))
    assert not torch.equal(found, FACES.read([4, 1]))


def test_conditions_and_seeds_are_told_apart() -> None:
    contents = {StressedImages(FACES, name, seed).content(0) for name in STRESS_CONDITIONS for seed in (0, 1)}
    assert len(contents) == 2 * len(STRESS_CONDITIONS) and FACES.content(0) not in contents


def test_another_seed_turns_some_faces_to_the_other_side() -> None:
    faces = [StressedImages(FACES, "turned", seed).read(range(6)) for seed in range(3)]
    assert not torch.equal(faces[0], faces[1]) or not torch.equal(faces[0], faces[2])


def test_what_cannot_be_stressed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of 'misaligned', .*, got 'upside-down'"):
        StressedImages(FACES, "upside-down")
    with pytest.raises(ImagesError, match="pass a folder or a uint8 tensor"):
        StressedImages(TensorImages(torch.zeros(1, 3, 8, 8)), "dark").read([0])
