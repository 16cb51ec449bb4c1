"""Training on changed faces: the same changes in any process and after any stop, and none where there are no bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qface.data.augmentation import AugmentationConfig
from qface.data.images import TensorImages
from qface.distillation import distill
from qface.distillation.batches import batches_of
from qface.parallel import Parallel
from tests.networks import random_faces

from .networks import CPU, Interrupted, changed, face_images, same_weights, tiny_network

CONFIG = changed(CPU, losses={"ekd_weight": 0.0}, batch_size=8, augmentation=AugmentationConfig(mixture=0.5))
FACES = TensorImages(random_faces(24, seed=2))


def first_batch(rank: int, processes: int, **changes: Any) -> torch.Tensor:
    parallel = cast(Parallel, SimpleNamespace(rank=rank, world_size=processes))
    return next(batches_of(FACES, changed(CONFIG, **changes), parallel).stream(range(1, 2))).images


def test_processes_see_the_changed_images_of_one() -> None:
    whole = first_batch(0, 1)
    assert torch.equal(torch.cat([first_batch(rank, 4) for rank in range(4)]), whole)
    plain = first_batch(0, 1, augmentation=None)
    assert (whole != plain).flatten(1).any(1).sum() > 0
    assert torch.equal(first_batch(0, 1, augmentation=AugmentationConfig.none()), plain)


def test_a_resumed_run_sees_the_same_changes(tmp_path: Path) -> None:
    straight, plain, resumed = tiny_network(0), tiny_network(0), tiny_network(0)
    distill(straight, tiny_network(1), FACES, CONFIG)
    distill(plain, tiny_network(1), FACES, changed(CONFIG, augmentation=None))
    assert not same_weights(straight, plain)
    with pytest.raises(KeyboardInterrupt):
        distill(resumed, tiny_network(1), Interrupted(FACES, 5), CONFIG, tmp_path)
    resumed = tiny_network(0)
    distill(resumed, tiny_network(1), FACES, CONFIG, tmp_path, resume=True)
    assert same_weights(straight, resumed)


def test_floats_are_left_alone_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    other, plain = tiny_network(0), tiny_network(0)
    distill(other, tiny_network(1), face_images(), CONFIG)
    assert "float images are not augmented: pass uint8 images" in caplog.text
    distill(plain, tiny_network(1), face_images(), changed(CONFIG, augmentation=None))
    assert same_weights(other, plain)
