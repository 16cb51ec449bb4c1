import os
import pickle
import shutil
import struct
import sys
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qface.data import ImageFolder, select_identities
from qface.errors import ImagesError


def save(path, size=(112, 112), mode="RGB", color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def message(root, identities=None):
    with pytest.raises(ImagesError) as error:
        ImageFolder(root, identities)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_people_are_labeled_in_sorted_order(crops):
    folder = ImageFolder(crops({"Bob": 2, "Ann": 1, "Cem": 3}))
    assert folder.names == folder.all_names == ["Ann", "Bob", "Cem"]
    assert folder.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert folder.labels.dtype == torch.int64
    assert [path.name for path in folder.paths[:3]] == ["Ann_0001.png", "Bob_0001.png", "Bob_0002.png"]
    assert (len(folder), folder.num_identities) == (6, 3)


def test_selection_keeps_labels_dense(crops, tmp_path):
    root = crops({"Ann": 1, "Bob": 2, "Cem": 1})
    (tmp_path / "people.txt").write_text("Cem\nBob\n")
    folder = ImageFolder(root, tmp_path / "people.txt")
    assert folder.names == ["Bob", "Cem"]
    assert folder.all_names == ["Ann", "Bob", "Cem"]
    assert folder.labels.tolist() == [0, 0, 1]


def test_headers_of_people_not_selected_are_not_checked(crops, tmp_path):
    root = crops({"Ann": 1, "Bob": 1})
    (root / "Bob" / "Bob_0002.png").write_bytes(b"")
    (tmp_path / "people.txt").write_text("Ann\n")
    assert len(ImageFolder(root, tmp_path / "people.txt")) == 1


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", "d.bmp", "e.jpeg"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert [path.name for path in folder.paths] == ["a.JPG", "b.png", "c.webp", "d.bmp", "e.jpeg"]
    assert folder.labels is None
    assert (folder.names, folder.num_identities) == ([], 0)
    assert "flat" in message(tmp_path, "first-half")


def test_other_files_and_hidden_ones_are_no_images(crops):
    root = crops({"Ann": 1})
    for name in ("notes.txt", "Ann/notes.txt", "Ann/._Ann_0001.png", ".cache.png"):
        (root / name).write_text("x")
    (root / ".thumbnails").mkdir()
    save(root / ".thumbnails" / "x.png")
    (root / "Nobody").mkdir()
    folder = ImageFolder(root)
    assert (len(folder), folder.all_names) == (1, ["Ann"])


def test_read_gives_rgb_bytes_in_the_order_asked(crops):
    folder = ImageFolder(crops({"Ann": 3}))
    images = folder.read([2, 0])
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    expected = [np.asarray(Image.open(folder.paths[index])) for index in (2, 0)]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_batches_cover_the_folder(crops):
    folder = ImageFolder(crops({"Ann": 3, "Bob": 2}))
    batches = list(folder.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), folder.read(range(5)))


@pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGBA", (7, 7, 7, 9)), ("P", 7), ("LA", (7, 9)), ("1", 1)])
def test_other_modes_become_rgb(tmp_path, mode, color):
    save(tmp_path / "x.png", mode=mode, color=color)
    expected = Image.open(tmp_path / "x.png").convert("RGB")
    assert torch.equal(
        ImageFolder(tmp_path).read([0])[0], torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
    )


def test_gray_pixels_keep_their_value(tmp_path):
    save(tmp_path / "x.png", mode="L", color=7)
    assert ImageFolder(tmp_path).read([0]).unique().tolist() == [7]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_turned_as_their_camera_says(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    assert np.array_equal(ImageFolder(tmp_path).read([0])[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_deep_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((112, 112), 40000, dtype=np.uint16)).save(tmp_path / "x.png")
    assert message(tmp_path).startswith("1 of 1 files")


def test_deep_colors_are_scaled(tmp_path):
    header = struct.pack(">IIBBBBB", 112, 112, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + struct.pack(">H", 40000) * 3 * 112) * 112)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    content = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))
    assert ImageFolder(tmp_path).read([0]).unique().tolist() == [40000 >> 8]


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "BMP", "WEBP", "GIF"])
def test_the_content_tells_the_format(tmp_path, form):
    face = Image.new("RGB", (112, 112), (8, 8, 8))
    face.save(tmp_path / "x.jpg", form, **({"save_all": True, "append_images": [face]} if form == "MPO" else {}))
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == form
    assert ImageFolder(tmp_path).read([0]).unique().tolist() == [8]


@pytest.mark.parametrize("form", ["EPS", "TIFF", "PPM"])
def test_formats_of_no_photos_are_refused(tmp_path, form):
    Image.new("RGB", (112, 112)).save(tmp_path / "x.jpg", form)
    assert message(tmp_path).startswith("1 of 1 files")


def test_folder_survives_pickling_for_loader_workers(crops):
    folder = pickle.loads(pickle.dumps(ImageFolder(crops({"Ann": 1}))))
    assert folder.read([0]).shape == (1, 3, 112, 112)


def test_all_wrong_sizes_are_counted(tmp_path):
    save(tmp_path / "s1" / "1.png", size=(92, 112))
    save(tmp_path / "s1" / "2.png")
    save(tmp_path / "s2" / "1.png", size=(112, 113))
    assert message(tmp_path) == (
        f"2 of 3 images in {tmp_path} are not 112x112 (first: s1/1.png is 92x112): align and crop them first"
    )


def test_all_files_that_are_no_images_are_counted(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "x.jpg").write_text("not an image")
    (tmp_path / "y.png").write_bytes(b"")
    assert message(tmp_path) == (
        f"2 of 3 files in {tmp_path} cannot be read as images (first: x.jpg): remove or repair them"
    )


def test_both_complaints_stand_in_one_line(tmp_path):
    save(tmp_path / "a.png", size=(8, 8))
    (tmp_path / "b.png").write_bytes(b"")
    assert "1 of 2 files" in message(tmp_path)
    assert "1 of 2 images" in message(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_truncated_images_are_counted_when_read(crops, ending):
    folder = ImageFolder(crops({"Ann": 4}, ending=ending))
    for path in folder.paths[1:3]:
        path.write_bytes(path.read_bytes()[:3000])
    reopened = ImageFolder(folder.root)
    assert reopened.read([0, 3]).shape == (2, 3, 112, 112)
    with pytest.raises(ImagesError, match=rf"^2 of 3 files .* \(first: Ann/Ann_0002.{ending}\)"):
        reopened.read([0, 1, 2])


def test_missing_empty_and_mixed_folders_are_errors(crops, tmp_path):
    assert "is not a folder" in message(tmp_path / "none")
    (tmp_path / "empty" / "Ann").mkdir(parents=True)
    assert "has no images" in message(tmp_path / "empty")
    mixed = crops({"Ann": 1})
    save(mixed / "loose.png")
    assert "(first: loose.png)" in message(mixed)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_must_not_be_read_is_named(crops):
    root = crops({"Ann": 1, "Bob": 1})
    (root / "Bob").chmod(0)
    try:
        assert "Bob cannot be read (Permission denied)" in message(root)
    finally:
        (root / "Bob").chmod(0o700)


@pytest.mark.faces
def test_lfw_opens_with_all_its_faces(faces):
    folder = ImageFolder(faces / "data" / "lfw")
    assert (len(folder), folder.num_identities) == (13233, 5749)
    assert len(ImageFolder(faces / "data" / "lfw", "first-half")) == 6715
    assert len(ImageFolder(faces / "data" / "lfw", "second-half")) == 6518


def test_files_that_are_not_read_are_counted_and_people_who_vanish_are_told(crops, caplog):
    root = crops({"Ann": 2})
    for name in ("Ann/1.heic", "Bob/1.tif", "Bob/2.tif", "Ann/.hidden"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    assert ImageFolder(root).names == ["Ann"]
    (message,) = caplog.messages
    assert (
        "3 files are not in a supported image format" in message
        and "1 identities have no image and are ignored (first: Bob)" in message
    )
    caplog.clear()
    (root / "Ann" / "1.heic").unlink()
    shutil.rmtree(root / "Bob")
    ImageFolder(root)
    assert not caplog.messages


@pytest.mark.skipif(sys.platform == "darwin", reason="one form of names")
def test_names_in_either_form_of_unicode_are_one_person(crops, tmp_path):
    names = ["Zoë", "Ann", "Bob", "José"]
    halves = []
    for form in ("NFC", "NFD"):
        root = crops({unicodedata.normalize(form, name): 1 for name in names}, folder=form)
        folder = ImageFolder(root, "first-half")
        halves.append([unicodedata.normalize("NFC", name) for name in folder.names])
        assert set(folder.names) <= set(folder.all_names) and len(folder) == 2
        (tmp_path / "people.txt").write_text("Zoë\nJose\u0301\n", encoding="utf-8")
        assert len(ImageFolder(root, tmp_path / "people.txt")) == 2
    assert halves[0] == halves[1]


def test_two_forms_of_one_name_are_refused():
    with pytest.raises(ImagesError, match="only in Unicode form"):
        select_identities(["Zo\u00eb", "Zoe\u0308"], None)
