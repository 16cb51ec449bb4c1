"""A folder of photos becomes a folder of crops."""

from __future__ import annotations

import os
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import qface
from qface.data import ARCFACE_LANDMARKS, ImageFolder, align
from qface.data.alignment import landmark_fault
from qface.errors import DependencyError, ExportError, ImagesError

SHIFT = np.array([40.0, 25.0])


def photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (180, 200, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def line(name: str) -> str:
    return " ".join([name, *map(str, (ARCFACE_LANDMARKS + SHIFT).ravel())]) + "\n"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(("Ann/1.png", "Ann/2.png", "Bob/1.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(path)
    return tmp_path / "photos"


def test_given_landmarks(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(line("Ann/1.png") + line("Bob/1.png"))
    report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
    assert (report.photos, report.aligned, report.present) == (3, 2, 0)
    assert report.faceless == ("Ann/2.png",)
    folder = ImageFolder(tmp_path / "crops")
    assert folder.names == ["Ann", "Bob"]
    expected = np.asarray(photo(2))[25:137, 40:152]
    assert np.abs(folder.read([1])[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@dataclass
class Face:
    bbox: np.ndarray
    landmarks: np.ndarray


class Detector:
    """Finds a face beside the middle, one in the middle, and a small one, unless the photo is black; counts photos."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def detect(self, image: np.ndarray) -> list[Face]:
        self.seen.append(image)
        if not image.any():
            return []
        boxes = ([0, 0, 60, 60], [70, 60, 130, 120], [95, 85, 105, 95])
        return [Face(np.array(box), ARCFACE_LANDMARKS + SHIFT * number) for number, box in enumerate(boxes)]


def test_the_face_in_the_middle_is_taken(photos: Path, tmp_path: Path) -> None:
    detector = Detector()
    Image.new("RGB", (50, 50)).save(photos / "Ann" / "3.png")
    report = align(photos, tmp_path / "crops", detector=detector)
    assert (report.aligned, report.faceless) == (3, ("Ann/3.png",))
    np.testing.assert_array_equal(detector.seen[0], np.asarray(photo(0))[:, :, ::-1])  # BGR
    crop = np.asarray(Image.open(tmp_path / "crops" / "Ann" / "1.png"), int)
    assert np.abs(crop - np.asarray(photo(0))[25:137, 40:152]).max() <= 1


def test_a_stopped_run_goes_on(photos: Path, tmp_path: Path) -> None:
    class Stopped(Detector):
        def detect(self, image: np.ndarray) -> list[Face]:
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super().detect(image)

    with pytest.raises(KeyboardInterrupt):
        align(photos, tmp_path / "crops", detector=Stopped())
    detector = Detector()
    report = align(photos, tmp_path / "crops", detector=detector)
    assert (report.aligned, report.present, len(detector.seen)) == (1, 2, 1)


def test_photos_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    upright = photo(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos" / "a.png", exif=exif)
    detector = Detector()
    align(tmp_path / "photos", tmp_path / "crops", detector=detector)
    np.testing.assert_array_equal(detector.seen[0], np.asarray(upright)[:, :, ::-1])


def test_files_that_are_no_images_are_named(photos: Path, tmp_path: Path) -> None:
    (photos / "Bob" / "2.png").write_bytes(b"no image")
    report = align(photos, tmp_path / "crops", detector=Detector())
    assert (report.aligned, report.unreadable) == (3, ("Bob/2.png",))
    assert report.to_dict()["unreadable"] == ("Bob/2.png",)


def test_deep_photos_are_not_clipped(photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((180, 200), 40000, np.uint16)).save(photos / "Bob" / "2.png")
    report = align(photos, tmp_path / "crops", detector=Detector())
    assert (report.aligned, report.unreadable) == (3, ("Bob/2.png",))


def test_landmarks_in_one_place_are_no_face(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text("Ann/1.png" + " 0" * 10 + "\n" + line("Bob/1.png"))
    report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
    assert (report.aligned, report.faceless) == (1, ("Ann/1.png", "Ann/2.png"))


@pytest.mark.parametrize("written", ["./Ann/1.png", "Ann\\1.png", ".\\Ann\\1.png", "Bob/../Ann//1.png"])
def test_names_of_landmarks_may_be_spelled_otherwise(written: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(line(written))
    report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
    assert (report.aligned, report.faceless) == (1, ("Ann/2.png", "Bob/1.png"))


@pytest.mark.skipif(os.name == "nt", reason="backslashes in names")
@pytest.mark.parametrize("written", ["Ann\\1.png", "./Ann\\1.png"])
def test_a_backslash_may_belong_to_a_name(written: str, photos: Path, tmp_path: Path) -> None:
    photo(3).save(photos / "Ann\\1.png")
    (tmp_path / "points.txt").write_text(line(written))
    report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
    assert "Ann\\1.png" not in report.faceless
    assert "Ann/1.png" in report.faceless


def test_landmarks_of_other_photos_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(line("photos/Ann/1.png") + line("photos/Bob/1.png"))
    with pytest.raises(ImagesError, match=r"first line: photos/Ann/1.png, first photo: Ann/1.png"):
        align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")


def test_landmarks_of_photos_that_have_crops_are_not_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text(line("Ann/1.png"))
    for aligned in (1, 0):
        report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
        assert (report.aligned, report.faceless) == (aligned, ("Ann/2.png", "Bob/1.png"))


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_links_to_folders_are_followed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    photo(3).save(tmp_path / "elsewhere" / "deep" / "1.png")
    (photos / "Cem").symlink_to(tmp_path / "elsewhere")
    report = align(photos, tmp_path / "crops", detector=Detector())
    assert report.aligned == 4
    assert (tmp_path / "crops" / "Cem" / "deep" / "1.png").is_file()


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_each_folder_is_read_once_and_loops_end(photos: Path, tmp_path: Path) -> None:
    (photos / "Aaron").symlink_to("Bob")  # sorted before it, and no reason to rename it
    (photos / "Ann" / "loop").symlink_to(photos)
    (photos / "up").symlink_to(tmp_path)
    for _ in range(2):
        align(photos, tmp_path / "crops", detector=Detector())
    crops = sorted(path.relative_to(tmp_path / "crops").as_posix() for path in (tmp_path / "crops").rglob("*.png"))
    assert crops == ["Ann/1.png", "Ann/2.png", "Bob/1.png"]


def test_odd_tags_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"odd")  # in words
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    photo(0).save(tmp_path / "photos" / "a.png", exif=exif)
    detector = Detector()
    assert align(tmp_path / "photos", tmp_path / "crops", detector=detector).aligned == 1
    np.testing.assert_array_equal(detector.seen[0], np.asarray(photo(0).rotate(-90, expand=True))[:, :, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation: int, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(0).save(tmp_path / "photos" / "a.png", exif=exif)
    detector = Detector()
    align(tmp_path / "photos", tmp_path / "crops", detector=detector)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "photos" / "a.png"))
    np.testing.assert_array_equal(detector.seen[0], np.asarray(expected)[:, :, ::-1])


def test_crops_among_the_photos_are_no_photos(photos: Path) -> None:
    for _ in range(2):
        assert align(photos, photos / "crops", detector=Detector()).photos == 3


def test_crops_in_place_of_the_photos_are_refused(photos: Path) -> None:
    before = {file: file.read_bytes() for file in photos.rglob("*.png")}
    for crops in (photos, photos / "Ann" / ".."):
        with pytest.raises(ExportError, match="choose another folder"):
            align(photos, crops, detector=Detector())
    assert {file: file.read_bytes() for file in photos.rglob("*") if file.is_file()} == before


def test_refusals(photos: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", "x" * 300, "a\0b"):
        with pytest.raises(ImagesError, match="is not a folder"):
            align(folder, tmp_path / "crops")
    with pytest.raises(ExportError, match=r"cannot create the folder .* File name too long"):
        align(photos, tmp_path / ("x" * 300), detector=Detector())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImagesError, match="has no photos"):
        align(tmp_path / "empty", tmp_path / "crops")
    photo(4).save(photos / "Bob" / "1.bmp")
    with pytest.raises(ExportError, match=r"Bob/1.bmp and Bob/1.png would both be written to"):
        align(photos, tmp_path / "crops", detector=Detector())


def test_without_a_detector_one_is_told_what_to_install(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uniface", None)
    with pytest.raises(qface.QFaceError, match=r"pip install 'qface\[align\]'"):
        align(photos, tmp_path / "crops")


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError])
def test_weights_that_cannot_be_fetched_are_one_line(error, photos: Path, tmp_path: Path, monkeypatch) -> None:
    def fail() -> None:
        raise error("the hash\ndoes not match")

    monkeypatch.setitem(sys.modules, "uniface", types.SimpleNamespace(RetinaFace=fail))
    with pytest.raises(
        DependencyError, match=r"cannot be downloaded \(the hash does not match\): pass a landmark file"
    ):
        align(photos, tmp_path / "crops")


ORDERS = {
    "the order of MTCNN": lambda points: points.T,
    "y before x": lambda points: points[:, ::-1],
    "the right eye first": lambda points: points[[1, 0, 2, 3, 4]],
    "the right corner of the mouth first": lambda points: points[[0, 1, 2, 4, 3]],
    "the viewer's right before the left": lambda points: points[[1, 0, 2, 4, 3]],
    "the mouth before the eyes": lambda points: points[[3, 4, 2, 0, 1]],
    "the eyes are below the mouth": lambda points: points[[4, 3, 2, 1, 0]],
    "between 0 and 1": lambda points: points / 200,
    "in a photo of 200x180": lambda points: points * 4,
}


@pytest.mark.parametrize("reason", list(ORDERS))
def test_landmarks_of_no_face_in_the_photo_are_named(reason: str, photos: Path, tmp_path: Path, caplog) -> None:
    wrong = ORDERS[reason](ARCFACE_LANDMARKS + SHIFT).ravel()
    lines = ["Ann/1.png " + " ".join(map(str, wrong)) + "\n", line("Ann/2.png"), line("Bob/1.png")]
    (tmp_path / "points.txt").write_text("".join(lines))
    report = align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")
    assert report.aligned == 2 and not (tmp_path / "crops" / "Ann" / "1.png").exists()
    (named,) = report.misplaced
    assert named.startswith("Ann/1.png: ") and reason in named
    assert any("Ann/1.png is not aligned" in message for message in caplog.messages)


def test_a_file_in_another_order_is_refused(photos: Path, tmp_path: Path) -> None:
    wrong = " ".join(map(str, (ARCFACE_LANDMARKS + SHIFT)[:, ::-1].ravel()))
    (tmp_path / "points.txt").write_text(f"Ann/1.png {wrong}\nBob/1.png {wrong}\n")
    with pytest.raises(
        ImagesError, match=r"2 of 2 lines in .* are not a face \(first: Ann/1.png: their order looks like"
    ):
        align(photos, tmp_path / "crops", landmarks=tmp_path / "points.txt")


def test_a_file_in_mtcnns_order_gives_the_same_crops(photos: Path, tmp_path: Path) -> None:
    points = " ".join(map(str, (ARCFACE_LANDMARKS + SHIFT).T.ravel()))
    (tmp_path / "mtcnn.txt").write_text("".join(f"{name} {points} 0.99\n" for name in ("Ann/1.png", "Bob/1.png")))
    (tmp_path / "points.txt").write_text(line("Ann/1.png") + line("Bob/1.png"))
    written = [tmp_path / "one", tmp_path / "other"]
    for crops, landmarks in zip(written, ("mtcnn.txt", "points.txt"), strict=True):
        assert align(photos, crops, landmarks=tmp_path / landmarks).aligned == 2
    one, other = (ImageFolder(crops).read([0, 1]) for crops in written)
    assert one.equal(other)


def turned(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """The landmarks of a rigid face, in degrees; the nose stands out of the plane of the eyes, the mouth a little."""
    depth = np.array([-4.0, -4.0, 18.0, 4.0, 4.0])
    face = np.column_stack([ARCFACE_LANDMARKS - ARCFACE_LANDMARKS.mean(0), depth - depth.mean()])
    y, p, r = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return (face @ (about_z @ about_x @ about_y).T)[:, :2]


@settings(max_examples=300)
@given(
    yaw=st.floats(-90, 90),
    pitch=st.floats(-30, 30),
    roll=st.floats(-60, 60),
    size=st.floats(0.3, 20),
    seed=st.integers(0, 10**6),
)
def test_faces_turned_as_far_as_profiles_pass(yaw: float, pitch: float, roll: float, size: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(-1.5, 1.5, (5, 2))
    points = 2000 + size * (turned(yaw, pitch, roll) + noise)
    assert landmark_fault(points, (4000, 4000)) is None
