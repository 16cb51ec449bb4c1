from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qface.data import read_galleries, read_templates
from qface.data.templates import people_of
from qface.errors import ImagesError, PairsError, QFaceError
from tests.data.ijb import SmallIjb


def test_lists_say_what_they_say(tmp_path: Path) -> None:
    written, templates = SmallIjb(tmp_path), read_templates(tmp_path)
    read = read_galleries(tmp_path, templates)
    assert list(read.galleries) == ["G1", "G2"]
    lists = {"gallery_G1": read.galleries["G1"], "gallery_G2": read.galleries["G2"], "probe_mixed": read.probes}
    subjects = sorted({subject for each in written.lists.values() for subject in each.values()})
    for name, found in lists.items():
        named = {int(templates.names[at]): subjects[read.subjects[at]] for at in found}
        assert named == written.lists[name]


def test_lists_of_ijbb_have_other_names(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    for file in (tmp_path / "meta").glob("ijbc_*"):
        file.rename(file.with_name(file.name.replace("ijbc", "ijbb").replace("_G", "_S")))
    read = read_galleries(tmp_path, read_templates(tmp_path))
    assert list(read.galleries) == ["S1", "S2"]
    assert len(read.probes) == len(written.lists["probe_mixed"])


def test_templates_may_be_in_no_list(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    left_out = min(written.lists["probe_mixed"])
    del written.lists["probe_mixed"][left_out]
    written.write_list("probe_mixed")
    templates = read_templates(tmp_path)
    read = read_galleries(tmp_path, templates)
    assert templates.names[read.subjects < 0].tolist() == [left_out]


def test_all_lists_or_none(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    templates = read_templates(tmp_path)
    for file in ("gallery_G2", "probe_mixed"):
        (tmp_path / "meta" / f"ijbc_1N_{file}.csv").unlink()
        with pytest.raises(ImagesError, match=r"one file \*_1N_gallery_\[GS\]2.csv for 1:N identification, but has 0"):
            read_galleries(tmp_path, templates)
    (tmp_path / "meta" / "ijbc_1N_gallery_G1.csv").unlink()
    assert read_galleries(tmp_path, templates) is None


HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
# Templates 7, 25, 43 are in G1, 16, 34, 52 in G2; subjects are 90, 83, 76, 69, 62, 55.
MALFORMED = {
    "no header": ("gallery_G1", "7,90,a.jpg\n", ImagesError, "must have a header with TEMPLATE_ID and SUBJECT_ID"),
    "empty": ("gallery_G1", "", ImagesError, "must have a header"),
    "no lines": ("gallery_G1", HEADER, ImagesError, "lists no templates"),
    "no subject": ("gallery_G1", HEADER + "7\n", ImagesError, "line 2: expected integers"),
    "not a number": ("gallery_G1", HEADER + "7,Ann,a.jpg\n", ImagesError, "line 2: expected integers"),
    "no images": ("gallery_G1", HEADER + "7,90,a.jpg\n8,90,a.jpg\n", ImagesError, r"1 of 2 .* no images \(first: 8\)"),
    "two subjects": ("gallery_G1", HEADER + "7,90,a.jpg\n7,91,a.jpg\n", ImagesError, "list template 7 in two files"),
    "in two lists": ("gallery_G1", HEADER + "16,83,a.jpg\n", ImagesError, "list template 16 in two files"),
    "also a probe": ("gallery_G1", HEADER + "10,90,a.jpg\n", ImagesError, "list template 10 in two files"),
    "enrolled twice": ("gallery_G1", HEADER + "7,83,a.jpg\n", ImagesError, "one subject with templates 7 and 16"),
    "no mates": ("gallery_G1", HEADER + "7,1,a.jpg\n", ImagesError, "no probe .* shows a subject of gallery G1"),
    "other labels": ("gallery_G1", HEADER + "7,90,a\n25,62,a\n43,76,a\n", PairsError, "contradict the labels of 8 of"),
}


@pytest.mark.parametrize(("name", "text", "error", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_lists(name: str, text: str, error: type[QFaceError], message: str, tmp_path: Path) -> None:
    SmallIjb(tmp_path).write(f"ijbc_1N_{name}.csv", text)
    with pytest.raises(error, match=message) as raised:
        read_galleries(tmp_path, read_templates(tmp_path))
    assert "\n" not in str(raised.value)


def test_people_are_connected_by_genuine_pairs(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path, people=4, templates=5)
    written.write("ijbc_template_pair_label.txt", "7 19 1\n13 16 1\n10 13 1\n16 19 1\n22 25 1\n7 22 0\n")
    people = people_of(read_templates(tmp_path))
    assert len(np.unique(people)) == people.max() + 1 == 2 + 13
    assert len(set(people[:5])) == 1 and people[5] == people[6] != people[0]


def test_pairs_that_contradict_themselves(tmp_path: Path) -> None:
    SmallIjb(tmp_path).write("ijbc_template_pair_label.txt", "7 10 1\n10 13 1\n7 13 0\n")
    with pytest.raises(PairsError, match="templates 7 and 13 are an impostor pair, but genuine pairs connect them"):
        people_of(read_templates(tmp_path))
