"""Sources say what tells one image from another."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from qface.data import ImageFolder
from qface.data.images import IndexedImages, TensorImages
from qface.data.records import RecordImages
from qface.data.relabeled import Relabeled
from qface.data.subset import Subset
from qface.data.templates import read_templates
from qface.data.verification_bin import VerificationBin
from qface.errors import ImagesError
from tests.conftest import Crops
from tests.data.ijb import SmallIjb
from tests.data.test_records import training_set, write
from tests.data.test_verification_bin import png


def contents(source: IndexedImages) -> list[bytes]:
    return [source.content(index) for index in range(len(source))]


def test_files_have_names_and_bytes(crops: Crops) -> None:
    folder = crops({"Ann": 2, "Bob": 1})
    before = contents(ImageFolder(folder))
    assert len(set(before)) == 3
    first = folder / "Ann" / "Ann_0001.png"
    first.write_bytes(first.read_bytes() + b"\0")
    changed = contents(ImageFolder(folder))
    assert changed[0] != before[0] and changed[1:] == before[1:]
    first.rename(folder / "Ann" / "Ann_0000.png")
    assert contents(ImageFolder(folder))[0] != changed[0]
    moved = folder.rename(folder.parent / "elsewhere")
    assert contents(ImageFolder(moved))[1:] == before[1:]
    source = ImageFolder(moved)
    (moved / "Bob" / "Bob_0001.png").unlink()
    with pytest.raises(ImagesError, match=r"Bob_0001\.png cannot be read"):
        source.content(2)


def test_parts_of_files_have_their_bytes(tmp_path: Path) -> None:
    records = RecordImages(write(tmp_path, training_set([2, 1])))
    images = [png(seed) for seed in range(4)]
    (tmp_path / "faces.bin").write_bytes(pickle.dumps((images, [True, False])))
    assert len(set(contents(records))) == 3
    assert contents(VerificationBin(tmp_path / "faces.bin")) == images


def test_faces_of_templates_have_their_landmarks(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    faces = read_templates(tmp_path).images
    before = contents(faces)
    assert len(set(before)) == len(before)
    faces.faces[0].points[0] += 1
    assert contents(faces)[0] != before[0] and contents(faces)[1:] == before[1:]


def test_tensors_have_their_values_and_other_sources_pass_them_on() -> None:
    images = TensorImages(torch.arange(2 * 3 * 4.0).reshape(2, 3, 2, 2))
    assert contents(images) == [images.images[0].numpy().tobytes(), images.images[1].numpy().tobytes()]
    assert contents(Subset(images, [1])) == contents(images)[1:]
    assert contents(Relabeled(images, None)) == contents(images)
