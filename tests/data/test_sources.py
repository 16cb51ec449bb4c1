import os
import pickle

import pytest
import torch

from qface.data import ImageFolder, LoaderImages, TensorImages, VerificationBin, as_image_source
from qface.errors import ImagesError


def test_as_image_source_recognizes_each_kind(crops):
    tensor = TensorImages(torch.zeros(1, 3, 4, 4))
    assert isinstance(as_image_source(crops({"Ann": 1})), ImageFolder)
    assert isinstance(as_image_source(torch.zeros(1, 3, 4, 4)), TensorImages)
    assert isinstance(as_image_source([torch.zeros(1, 3, 4, 4)]), LoaderImages)
    assert as_image_source(tensor) is tensor
    with pytest.raises(ImagesError, match="got int"):
        as_image_source(5)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_paths_that_no_folder_can_have_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 300, "a\0b", tmp_path / "loop", str(tmp_path / "loop" / "FP")):
        with pytest.raises(ImagesError, match="is not a folder"):
            as_image_source(path)


def test_endings_of_files_may_be_capitals(crops, tmp_path):
    face = ImageFolder(crops({"Ann": 1})).paths[0].read_bytes()
    (tmp_path / "X.BIN").write_bytes(pickle.dumps(([face, face], [True])))
    assert isinstance(as_image_source(tmp_path / "X.BIN"), VerificationBin)
    with pytest.raises(ImagesError, match=r"X.REC cannot be opened"):
        as_image_source(tmp_path / "X.REC")


def test_no_images_are_an_empty_batch(crops, tmp_path):
    folder = crops({"Ann": 1})
    face = ImageFolder(folder).paths[0].read_bytes()
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([face, face], [True])))
    crop = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    for images in (folder, tmp_path / "x.bin", crop):
        batch = as_image_source(images).read([])
        assert (batch.dtype, tuple(batch.shape)) == (torch.uint8, (0, 3, 112, 112))


def test_people_select_from_folders_only(crops):
    folder = crops({"Ann": 1, "Bob": 1})
    assert as_image_source(folder, identities="first-half").num_identities == 1
    with pytest.raises(ImagesError, match="only be selected from a folder"):
        as_image_source(torch.zeros(1, 3, 4, 4), identities="first-half")
