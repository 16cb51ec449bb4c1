from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qface.data import ARCFACE_LANDMARKS, read_templates
from qface.errors import ImagesError, PairsError
from tests.data.ijb import SmallIjb


def test_files_say_what_they_say(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    read = read_templates(tmp_path)
    files, templates, media, scores = zip(*written.rows, strict=True)
    assert [face.file for face in read.images.faces] == list(files)
    assert read.names[read.templates].tolist() == list(templates)
    assert read.media.tolist() == list(media)
    np.testing.assert_array_equal(read.scores, np.array(scores, np.float32))
    pairs = zip(read.names[read.first], read.names[read.second], read.same, strict=True)
    assert [tuple(map(int, pair)) for pair in pairs] == written.pairs


def test_scores_are_of_all_images_or_of_none(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    listed = tmp_path / "meta" / "ijbc_name_5pts_score.txt"
    first, *others = listed.read_text().splitlines(keepends=True)
    listed.write_text(first.rpartition(" ")[0] + "\n" + "".join(others))
    assert read_templates(tmp_path).scores is None


def test_what_systems_add_to_files_does_not_matter(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    for file in (tmp_path / "meta").iterdir():
        file.write_text(file.read_text(), encoding="utf-8-sig")
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")  # macOS's companion
    read = read_templates(tmp_path)
    assert (len(read.images), len(read.same)) == (len(written.rows), len(written.pairs))


def test_numbers_may_be_negative(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    written.write(
        "ijbc_face_tid_mid.txt", "".join(f"{file} {owner} {-media}\n" for file, owner, media, _ in written.rows)
    )
    assert read_templates(tmp_path).media.tolist() == [-media for _, _, media, _ in written.rows]


def test_photos_are_aligned_by_their_landmarks(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    read = read_templates(tmp_path)
    left, top = (read.images.faces[3].points - ARCFACE_LANDMARKS)[0].round().astype(int)
    crop = read.images.read([3])[0].permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(Image.open(tmp_path / "loose_crop" / "4.jpg"), int)[top : top + 112, left : left + 112]
    assert np.abs(crop - expected).max() <= 2


MALFORMED = {
    "an image has no template": ("ijbc_face_tid_mid.txt", "1.jpg 7\n", ImagesError, "line 1: expected"),
    "a number is none": ("ijbc_face_tid_mid.txt", "1.jpg 7 x\n", ImagesError, "line 1: expected"),
    "a number has two signs": ("ijbc_face_tid_mid.txt", "1.jpg 7 --3\n", ImagesError, "line 1: expected"),
    "a number is of 19 digits": ("ijbc_face_tid_mid.txt", f"1.jpg 7 {10**18}\n", ImagesError, "line 1: expected"),
    "a number is of 5,000": ("ijbc_face_tid_mid.txt", f"1.jpg 7 -{'9' * 5000}\n", ImagesError, "line 1: expected"),
    "images are missing": ("ijbc_face_tid_mid.txt", "1.jpg 7 3\n", ImagesError, "lists 1 images"),
    "orders differ": ("ijbc_face_tid_mid.txt", "2.jpg 7 3\n", ImagesError, "line 1 lists 2.jpg"),
    "a pair has no label": ("ijbc_template_pair_label.txt", "7 10\n", PairsError, "must have lines"),
    "a label is 2": ("ijbc_template_pair_label.txt", "7 10 2\n", PairsError, "must have lines"),
    "a pair is no numbers": ("ijbc_template_pair_label.txt", "7 ten 1\n", PairsError, "cannot be read as pairs"),
    "no pairs": ("ijbc_template_pair_label.txt", "", PairsError, "must have lines"),
    "a template is unknown": ("ijbc_template_pair_label.txt", "7 10 1\n7 8 0\n", PairsError, "1 of 2 pairs"),
    "only one kind": ("ijbc_template_pair_label.txt", "7 10 1\n7 10 1\n", PairsError, "only one kind of pairs"),
    "a template is beyond the last": ("ijbc_template_pair_label.txt", "7 9999 0\n", PairsError, "1 of 1 pairs"),
}


@pytest.mark.parametrize(("file", "text", "error", "message"), MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_malformed_files(file: str, text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    SmallIjb(tmp_path).write(file, text)
    with pytest.raises(error, match=message):
        read_templates(tmp_path)


def test_a_missing_file_and_a_missing_photo_are_named(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    (tmp_path / "loose_crop" / "2.jpg").unlink()
    with pytest.raises(ImagesError, match=r"2.jpg cannot be read as a face"):
        read_templates(tmp_path).images.read([0, 1])
    (tmp_path / "meta" / "ijbc_face_tid_mid.txt").unlink()
    with pytest.raises(ImagesError, match=r"one file \*_face_tid_mid.txt, but has 0"):
        read_templates(tmp_path)
