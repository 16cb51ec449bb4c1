"""CFP's folders, written as http://www.cfpw.io gives them out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qface
from qface.data import CfpSplit, as_image_source
from qface.errors import ImagesError, PairsError
from tests.networks import tiny_face_net

PEOPLE, FOLDS = 6, 10


def pixels(person: int, kind: str, number: int) -> np.ndarray:
    seed = 100 * person + 10 * (kind == "profile") + number
    return np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)


@pytest.fixture
def cfp(tmp_path: Path) -> Path:
    """Six people with four frontal and two profile images each, and ten folds."""
    lists: dict[str, list[str]] = {"F": [], "P": []}
    for person in range(1, PEOPLE + 1):
        for kind, count in (("frontal", 4), ("profile", 2)):
            folder = tmp_path / "Data" / "Images" / f"{person:03d}" / kind
            folder.mkdir(parents=True)
            for number in range(1, count + 1):
                Image.fromarray(pixels(person, kind, number)).save(folder / f"{number:02d}.png")
                listed = lists[kind[0].upper()]
                listed.append(f"{len(listed) + 1} ../Data/Images/{person:03d}/{kind}/{number:02d}.jpg\n")
    (tmp_path / "Protocol").mkdir()
    for name, lines in lists.items():
        (tmp_path / "Protocol" / f"Pair_list_{name}.txt").write_text("".join(lines))
    for split, per_person in (("FF", 4), ("FP", 2)):
        for fold in range(FOLDS):
            folder = tmp_path / "Protocol" / "Split" / split / f"{fold + 1:02d}"
            folder.mkdir(parents=True)
            person, other = fold % PEOPLE, (fold + 1) % PEOPLE
            one, mate, stranger = 4 * person + 1, per_person * person + 2, per_person * other + 1
            (folder / "same.txt").write_text(f"{one},{mate}\r\n{one + 2},{mate}\r\n")
            (folder / "diff.txt").write_text(f"{one},{stranger}\n")
    return tmp_path


def test_frontal_and_profile(cfp: Path) -> None:
    source = as_image_source(cfp / "Protocol" / "Split" / "FP")
    assert isinstance(source, CfpSplit)
    assert source.labels is None
    assert source.pairs.same.tolist() == [True, True, False] * FOLDS
    assert source.pairs.fold.tolist() == [fold for fold in range(FOLDS) for _ in range(3)]
    # pair 5 is the last of fold 2: person 2's first frontal image and person 3's first profile
    first, second = source.pairs.first[5], source.pairs.second[5]
    crops = source.read([first, second]).permute(0, 2, 3, 1)
    assert torch.equal(crops[0], torch.from_numpy(pixels(2, "frontal", 1)))
    assert torch.equal(crops[1], torch.from_numpy(pixels(3, "profile", 1)))


def test_frontal_and_frontal(cfp: Path) -> None:
    source = CfpSplit(cfp / "Protocol" / "Split" / "FF")
    assert {path.parent.name for path in source.paths} == {"frontal"}
    second = source.paths[source.pairs.second[1]]
    assert second.relative_to(cfp).as_posix() == "Data/Images/001/frontal/02.png"


def test_evaluation(cfp: Path) -> None:
    result = qface.evaluate(tiny_face_net(), cfp / "Protocol" / "Split" / "FP")
    assert result.pairs == 3 * FOLDS
    assert (result.genuine_pairs, result.impostor_pairs) == (20, 10)
    assert result.accuracy is not None


BROKEN = {
    "a number is in no list": ("Split/FP/03/diff.txt", "1,99\n", PairsError, r"1 image numbers in .* \(first: 99\)"),
    "no comma": ("Split/FP/03/same.txt", "1 2\n", PairsError, "same.txt, line 1: expected 'number,number'"),
    "a list without numbers": ("Pair_list_P.txt", "../Data/Images/1.jpg\n", PairsError, "line 1: expected 'number"),
    "a list without Data": ("Pair_list_P.txt", "1 /etc/passwd\n", PairsError, "line 1: expected 'number"),
    "a path out of CFP's folder": (
        "Pair_list_P.txt",
        "1 ../Data/../../x.jpg\n",
        PairsError,
        "line 1: expected 'number",
    ),
    "a list with a number of 5,000 digits": (
        "Pair_list_P.txt",
        f"{'9' * 5000} ../Data/x.jpg\n",
        PairsError,
        "line 1: expected 'number",
    ),
    "a short list": ("Pair_list_F.txt", "1 ../Data/x.jpg\n", PairsError, "not in the image lists"),
    "a number of 5,000 digits": ("Split/FP/03/diff.txt", f"1,{'9' * 5000}\n", PairsError, "line 1: expected 'number,"),
}


@pytest.mark.parametrize(("file", "text", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_malformed_lists(file: str, text: str, error: type[Exception], message: str, cfp: Path) -> None:
    (cfp / "Protocol" / file).write_text(text)
    with pytest.raises(error, match=message):
        CfpSplit(cfp / "Protocol" / "Split" / "FP")


def test_missing_and_damaged_images(cfp: Path) -> None:
    split = cfp / "Protocol" / "Split" / "FF"
    image = cfp / "Data" / "Images" / "001" / "frontal" / "01.png"
    image.write_bytes(b"none")
    source = CfpSplit(split)
    with pytest.raises(ImagesError, match=r"01.png cannot be read as a crop"):
        source.read(range(len(source)))
    image.unlink()
    with pytest.raises(ImagesError, match=r"there is no image .*01.jpg: write"):
        CfpSplit(split)


def test_a_split_may_be_the_working_directory(cfp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cfp / "Protocol" / "Split" / "FP")
    assert len(as_image_source(".")) == len(CfpSplit(cfp / "Protocol" / "Split" / "FP"))


@pytest.mark.parametrize("is_file", [False, True])
def test_a_split_that_is_no_folder_is_refused(is_file: bool, cfp: Path) -> None:
    split = cfp / "Protocol" / "Split" / "FP"
    shutil.rmtree(split)
    if is_file:
        split.write_text("")
    with pytest.raises(ImagesError, match="FP is not a folder"):
        as_image_source(split)
    with pytest.raises(PairsError, match="is not a split of CFP"):
        CfpSplit(split)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_split_that_must_not_be_read_is_named(cfp: Path) -> None:
    split = cfp / "Protocol" / "Split" / "FP"
    split.chmod(0)
    try:
        with pytest.raises(ImagesError, match=r"FP cannot be read \(Permission denied\)"):
            CfpSplit(split)
    finally:
        split.chmod(0o700)


def test_an_image_that_no_disk_can_hold_is_missing(cfp: Path) -> None:
    (cfp / "Protocol" / "Pair_list_F.txt").write_text(f"1 ../Data/{'x' * 300}.jpg\n")
    shutil.rmtree(cfp / "Protocol" / "Split" / "FF")
    (cfp / "Protocol" / "Split" / "FF" / "01").mkdir(parents=True)
    for name in ("same.txt", "diff.txt"):
        (cfp / "Protocol" / "Split" / "FF" / "01" / name).write_text("1,1\n")
    with pytest.raises(ImagesError, match="there is no image"):
        CfpSplit(cfp / "Protocol" / "Split" / "FF")


def test_other_folders_are_no_splits(cfp: Path) -> None:
    with pytest.raises(PairsError, match="is not a split of CFP"):
        CfpSplit(cfp / "Protocol")
    (cfp / "Protocol" / "Split" / "FP" / "01" / "same.txt").unlink()
    with pytest.raises(ImagesError, match="there is no file"):
        CfpSplit(cfp / "Protocol" / "Split" / "FP")
    with pytest.raises(ImagesError, match="identities can only be selected from a folder"):
        as_image_source(cfp / "Protocol" / "Split" / "FF", identities="first-half")


def test_an_image_is_told_by_name_and_bytes(cfp: Path) -> None:
    source = CfpSplit(cfp / "Protocol" / "Split" / "FP")
    assert source.content(0) == b"Data/Images/001/frontal/01.png\0" + source.paths[0].read_bytes()
