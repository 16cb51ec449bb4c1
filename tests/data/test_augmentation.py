"""Random changes of training images: each part alone, and what they are functions of."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qface.data.augmentation import AugmentationConfig, augmented
from qface.errors import ConfigError
from tests.networks import random_faces

PARTS = [field.name for field in fields(AugmentationConfig)]
FACES = random_faces(6, seed=3)


def changed(config: AugmentationConfig, faces: Tensor = FACES, seed: int = 0, step: int = 0) -> Tensor:
    return augmented(faces, faces.roll(-1, 0), config, seed, step)


def always(*parts: str) -> AugmentationConfig:
    return replace(AugmentationConfig.none(), **dict.fromkeys(parts, 1.0))


def test_without_any_part_images_stay_as_they_are() -> None:
    assert torch.equal(changed(AugmentationConfig.none()), FACES)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_every_image_and_no_two_alike(part: str) -> None:
    found = changed(always(part), FACES[:1].repeat(6, 1, 1, 1) if part != "mixture" else FACES)
    assert found.dtype == torch.uint8 and found.shape == FACES.shape
    assert all(not torch.equal(one, FACES[0]) for one in found)
    if part != "gray":
        assert len({one.numpy().tobytes() for one in found}) == 6


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 5))
def test_several_processes_change_a_batch_as_one_does(seed: int, step: int, split: int) -> None:
    config = AugmentationConfig(**dict.fromkeys(PARTS, 0.5))
    mates = FACES.roll(-1, 0)
    whole = augmented(FACES, mates, config, seed, step)
    parts = [augmented(FACES[at], mates[at], config, seed, step, at.start) for at in (slice(0, split), slice(split, 6))]
    assert torch.equal(torch.cat(parts), whole)


def test_another_step_and_another_seed_change_otherwise() -> None:
    config = always("turn", "exposure")
    once = changed(config, seed=1, step=2)
    assert torch.equal(changed(config, seed=1, step=2), once)
    assert not torch.equal(changed(config, seed=1, step=3), once)
    assert not torch.equal(changed(config, seed=2, step=2), once)


def test_a_share_is_that_of_the_images_changed() -> None:
    faces = FACES[:1].repeat(2000, 1, 1, 1)[:, :, :2, :2].contiguous()
    config = replace(AugmentationConfig.none(), gray=0.3)
    share = (augmented(faces, faces, config, 0, 0) != faces).flatten(1).any(1).float().mean()
    assert 0.27 < share < 0.33


def test_a_turned_face_keeps_its_middle() -> None:
    ramp = torch.arange(112, dtype=torch.uint8).expand(40, 3, 112, 112)
    found = changed(always("turn"), ramp).float()
    assert (found[:, 0, 56, 55:57].mean(1) - 55.5).abs().max() < 2.5
    # one half grows narrower: from the middle, columns run faster than in the other half
    steps = found[:, 0, 56, 40:72].diff(dim=1)
    assert ((steps[:, :8].mean(1) - steps[:, -8:].mean(1)).abs() > 0.01).float().mean() > 0.8


def test_a_mixture_lies_between_two_faces_and_nearer_to_its_own() -> None:
    found, mates = changed(always("mixture")).float(), FACES.roll(-1, 0).float()
    own, other = ((found - faces).abs().mean((1, 2, 3)) for faces in (FACES.float(), mates))
    assert (own <= other + 0.5).all()
    assert ((found <= torch.maximum(FACES, mates.byte()).float()) & (found >= torch.minimum(FACES, mates.byte()))).all()


def test_what_covers_a_face_leaves_the_rest() -> None:
    same = (changed(always("occlusion")) == FACES).all(1).float().mean((1, 2))
    assert ((same > 0.7) & (same < 1)).all()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True, "much"])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="augmentation blur must be a number from 0 to 1"):
        AugmentationConfig(blur=share)  # type: ignore[arg-type]
