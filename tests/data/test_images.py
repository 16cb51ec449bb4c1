from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qface
from qface.data import LoaderImages, TensorImages, normalize
from qface.errors import ImagesError
from qface.preprocessing import Preprocessing
from tests.networks import random_faces, tiny_face_net


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 3, 112, 112),
        torch.zeros(3, 112, 112),
        torch.zeros(2, 1, 112, 112),
        torch.zeros(2, 3, 96, 112, dtype=torch.uint8),
        torch.zeros(2, 3, 112, 112, dtype=torch.int64),
    ],
)
def test_tensor_of_wrong_shape_or_type_is_refused(images):
    with pytest.raises(ImagesError):
        TensorImages(images)


def test_tensor_needs_one_label_an_image():
    with pytest.raises(ImagesError, match=r"2 images need labels of shape \[2\], got \[3\]"):
        TensorImages(torch.zeros(2, 3, 8, 8), torch.zeros(3))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_tensor_batches_give_each_image_once_in_order(batch_size):
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 3, 2, 2)
    batches = list(TensorImages(images).batches(batch_size))
    assert all(len(batch) <= batch_size for batch in batches)
    assert torch.equal(torch.cat(batches), images)


def test_tensor_reads_in_any_order():
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert TensorImages(images).read([4, 0, 4])[:, 0, 0, 0].tolist() == [4, 0, 4]


def test_loader_passes_tensors_and_first_elements():
    batch = torch.zeros(2, 3, 4, 4)
    assert [b.shape for b in LoaderImages([batch, (batch, torch.zeros(2)), [batch]]).batches(1)] == [batch.shape] * 3


def test_loader_of_other_things_is_refused():
    with pytest.raises(ImagesError, match="got str"):
        list(LoaderImages(["face.png"]).batches(1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 112, 112, dtype=torch.uint8), "wrap it in a DataLoader"),
        (torch.zeros(2, 3, 160, 160, dtype=torch.uint8), "got 160x160"),
        (torch.zeros(2, 1, 112, 112, dtype=torch.uint8), r"\[N, 3, height, width\]"),
        (torch.zeros(2, 112, 112, 3), r"\[N, 3, height, width\]"),
        (torch.zeros(2, 3, 112, 112, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_batches_of_a_loader_are_held_to_what_tensors_are(batch, message):
    with pytest.raises(ImagesError, match=message):
        list(LoaderImages([(batch, 0)]).batches(1))


def test_normalize_touches_bytes_only():
    floats = torch.rand(1, 3, 112, 112)
    assert normalize(floats, Preprocessing()) is floats
    white = torch.full((1, 3, 112, 112), 255, dtype=torch.uint8)
    assert torch.equal(normalize(white, Preprocessing()), torch.ones(1, 3, 112, 112))


CROPS = random_faces(8)
WRONG = {"0..255": CROPS.float(), "0..1": CROPS / 255, "another mean": Preprocessing()(CROPS) + 0.5}


def student() -> Any:
    return qface.calibrate(qface.quantize(tiny_face_net()), CROPS)


def evaluated(images: Tensor, folder: Path) -> None:
    qface.evaluate(tiny_face_net(), TensorImages(images, torch.arange(8) // 2))


def distilled(images: Tensor, folder: Path) -> None:
    qface.distill(student(), tiny_face_net(), images, qface.DistillConfig(max_steps=1, batch_size=4), progress=False)


def verified(images: Tensor, folder: Path) -> None:
    made = student()
    qface.verify(made, qface.export(made, folder / "s.onnx"), images)


VERBS: dict[str, Callable[[Tensor, Path], Any]] = {
    "calibrate": lambda images, folder: qface.calibrate(qface.quantize(tiny_face_net()), images),
    "evaluate": evaluated,
    "distill": distilled,
    "prune": lambda images, folder: qface.prune(tiny_face_net(), 0.5, images),
    "sensitivity": lambda images, folder: qface.sensitivity(tiny_face_net(), images, weight_bits=(4,)),
    "export": lambda images, folder: qface.export(tiny_face_net(), folder / "m.onnx", images=images),
    "verify": verified,
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_refuses_floats_that_were_not_normalized_for_its_network(verb: str, tmp_path: Path) -> None:
    for images in WRONG.values():
        with pytest.raises(ImagesError, match=r"but the Preprocessing of the network gives -1 to 1: set the"):
            VERBS[verb](images, tmp_path)


def test_what_floats_look_like_is_said() -> None:
    for images, looks in ((CROPS / 255, "only divided by 255"), (CROPS.float(), "not normalized")):
        with pytest.raises(ImagesError, match=looks):
            normalize(images, Preprocessing())


def test_floats_within_a_gray_level_of_the_range_pass() -> None:
    images = Preprocessing()(CROPS)
    for shift in (0.0, 0.9 / 127.5, -0.9 / 127.5):
        assert torch.equal(normalize(images + shift, Preprocessing()), images + shift)
    assert len(normalize(images.half(), Preprocessing())) == 8
    one = torch.rand(1, 3, 8, 8)  # of one image alone it cannot be told
    assert torch.equal(normalize(one, Preprocessing()), one)
    divided = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3)
    assert torch.equal(normalize(CROPS / 255, divided), CROPS / 255)


def test_each_channel_has_its_own_range() -> None:
    preprocessing = Preprocessing(mean=(0.0, 127.5, 255.0), std=(255.0,) * 3)
    images = preprocessing(CROPS)
    assert torch.equal(normalize(images, preprocessing), images)
    with pytest.raises(ImagesError, match="Preprocessing of the network gives -1 to 1"):
        normalize(images.flip(1), preprocessing)
