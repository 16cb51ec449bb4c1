import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qface.data import select_identities
from qface.errors import ImagesError

NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    min_size=2,
    unique_by=lambda name: unicodedata.normalize("NFC", name),
)


def test_none_selects_all_sorted():
    assert select_identities(["Bob", "Ann"], None) == ["Ann", "Bob"]


@given(NAMES)
def test_halves_part_the_names(names):
    first, second = select_identities(names, "first-half"), select_identities(names, "second-half")
    assert sorted(first + second) == sorted(names)
    assert len(first) - len(second) in (0, 1)
    assert first == sorted(first)


@given(NAMES)
def test_first_half_has_the_lower_digests(names):
    def digest(name):
        return hashlib.sha256(unicodedata.normalize("NFC", name).encode()).hexdigest()

    first, second = select_identities(names, "first-half"), select_identities(names, "second-half")
    assert max(map(digest, first)) < min(map(digest, second))


def test_order_of_the_names_does_not_matter():
    assert select_identities(["a", "b", "c"], "first-half") == select_identities(["c", "a", "b"], "first-half")


def test_file_selects_its_lines(tmp_path):
    listing = tmp_path / "people.txt"
    listing.write_text("Zoë\n\n  Ann \r\nAnn\n", encoding="utf-8")
    assert select_identities(["Ann", "Bob", "Zoë"], listing) == ["Ann", "Zoë"]
    assert select_identities(["Ann", "Bob", "Zoë"], str(listing)) == ["Ann", "Zoë"]


def test_missing_file_names_the_keywords(tmp_path):
    with pytest.raises(ImagesError, match="first-half, second-half") as error:
        select_identities(["Ann"], tmp_path / "none.txt")
    assert "\n" not in str(error.value)


def test_unreadable_file_is_an_error(tmp_path):
    (tmp_path / "people.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ImagesError, match="cannot be read as text"):
        select_identities(["Ann"], tmp_path / "people.txt")
    with pytest.raises(ImagesError, match="cannot be read as text"):
        select_identities(["Ann"], tmp_path)


def test_unknown_names_are_counted(tmp_path):
    (tmp_path / "people.txt").write_text("Ann\nYan\nXia\n")
    with pytest.raises(ImagesError, match=r"^2 of 3 names .* \(first: Xia\)"):
        select_identities(["Ann", "Bob"], tmp_path / "people.txt")


def test_nobody_left_is_an_error(tmp_path):
    (tmp_path / "people.txt").write_text("\n")
    with pytest.raises(ImagesError, match="1 identities, none selected"):
        select_identities(["Ann"], tmp_path / "people.txt")
    with pytest.raises(ImagesError, match="1 identities, none selected"):
        select_identities(["Ann"], "second-half")
