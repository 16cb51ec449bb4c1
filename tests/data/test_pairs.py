import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qface.data import ImageFolder, read_lfw_pairs, resolve_pairs
from qface.errors import PairsError

LIST = "2\t1\nAnn\t1\t2\nAnn\t2\tBob\t1\nBob\t1\t2\nBob\t2\tCem\t1\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "pairs.txt").write_text(text, encoding="utf-8")
        return tmp_path / "pairs.txt"

    return write


def message(path):
    with pytest.raises(PairsError) as error:
        read_lfw_pairs(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_reads_folds_of_same_and_different_pairs(write):
    pairs = read_lfw_pairs(write(LIST))
    assert pairs.first == [("Ann", 1), ("Ann", 2), ("Bob", 1), ("Bob", 2)]
    assert pairs.second == [("Ann", 2), ("Bob", 1), ("Bob", 2), ("Cem", 1)]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]
    assert len(pairs) == 4


def test_single_number_is_one_fold(write):
    pairs = read_lfw_pairs(write("2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t1\nAnn\t2\tBob\t2\n"))
    assert pairs.fold.tolist() == [0] * 4
    assert pairs.same.tolist() == [True, True, False, False]


def test_blanks_separate_where_there_are_no_tabs_and_blank_lines_do_not_count(write):
    assert read_lfw_pairs(write("1 1\n\nAnn 1 2\nAnn 1  Bob 2\n\n")).second == [("Ann", 2), ("Bob", 2)]


def test_names_may_hold_blanks_between_tabs(write):
    assert read_lfw_pairs(write("1\nAnn Lee\t1\t2\nAnn Lee\t1\tBob\t2\n")).first[0] == ("Ann Lee", 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(folds=st.integers(1, 4), per_fold=st.integers(1, 4), data=st.data())
def test_reads_what_was_written(write, folds, per_fold, data):
    number = st.integers(1, 9999)
    lines = []
    for _ in range(folds):
        lines += [f"A\t{data.draw(number)}\t{data.draw(number)}" for _ in range(per_fold)]
        lines += [f"A\t{data.draw(number)}\tB\t{data.draw(number)}" for _ in range(per_fold)]
    pairs = read_lfw_pairs(write("\n".join([f"{folds}\t{per_fold}", *lines])))
    rebuilt = [
        f"{a}\t{i}\t{j}" if same else f"{a}\t{i}\t{b}\t{j}"
        for (a, i), (b, j), same in zip(pairs.first, pairs.second, pairs.same, strict=True)
    ]
    assert rebuilt == lines
    assert np.array_equal(pairs.fold, np.repeat(np.arange(folds), 2 * per_fold))


@pytest.mark.parametrize("header", ["", "x", "1\t2\t3", "0\t1", "-1", "1.5\t2"])
def test_malformed_header_is_an_error(write, header):
    assert "line 1: expected" in message(write(header + "\nAnn\t1\t2\nAnn\t1\tBob\t1\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\nAnn\t1\nAnn\t1\tBob\t1\n", "line 2: expected a same pair"),
        ("1\n\nAnn\t1\tBob\t1\nAnn\t1\t2\n", "line 3: expected a same pair"),
        ("1\nAnn\t1\t2\nAnn\t1\t2\n", "line 3: expected a different pair"),
        ("1\nAnn\t1\tx\nAnn\t1\tBob\t1\n", "line 2: expected a same pair"),
        ("1\nAnn\t0\t1\nAnn\t1\tBob\t1\n", "line 2: expected a same pair"),
        ("1\nAnn\t1\t2\nAnn\t1\tBob\tx\n", "line 3: expected a different pair"),
    ],
)
def test_malformed_lines_are_named(write, text, expected):
    assert expected in message(write(text))


@pytest.mark.parametrize("text", [LIST + "Ann\t1\t2\n", LIST[: LIST.rindex("Bob")], "2\t1\n"])
def test_wrong_number_of_pairs_is_an_error(write, text):
    assert "announces 4 pairs" in message(write(text))


def test_missing_and_binary_files_are_errors(tmp_path):
    assert "does not exist" in message(tmp_path / "none.txt")
    (tmp_path / "pairs.bin").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read as text" in message(tmp_path / "pairs.bin")


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pairs_resolve_to_paths(crops, write, ending):
    folder = ImageFolder(crops({"Ann": 2, "Bob": 2, "Cem": 1}, ending=ending))
    resolved = resolve_pairs(read_lfw_pairs(write(LIST)), folder)
    names = [(folder.paths[i].stem, folder.paths[j].stem) for i, j in zip(resolved.first, resolved.second, strict=True)]
    assert names == [
        ("Ann_0001", "Ann_0002"),
        ("Ann_0002", "Bob_0001"),
        ("Bob_0001", "Bob_0002"),
        ("Bob_0002", "Cem_0001"),
    ]
    assert resolved.dropped == 0


def test_pairs_of_people_not_selected_are_dropped_and_folds_stay(crops, write, tmp_path):
    root = crops({"Ann": 2, "Bob": 2, "Cem": 1})
    (tmp_path / "people.txt").write_text("Bob\nCem\n")
    resolved = resolve_pairs(read_lfw_pairs(write(LIST)), ImageFolder(root, tmp_path / "people.txt"))
    assert (len(resolved), resolved.dropped) == (2, 2)
    assert resolved.fold.tolist() == [1, 1]
    assert resolved.same.tolist() == [True, False]


def test_missing_images_and_unknown_people_are_counted_in_one_line(crops, write):
    folder = ImageFolder(crops({"Ann": 2, "Bob": 1}))
    expected = r"^2 of 4 pairs .* \(first: Bob/Bob_0002 of the pair Bob_0001, Bob_0002\)"
    with pytest.raises(PairsError, match=expected):
        resolve_pairs(read_lfw_pairs(write(LIST)), folder)


def test_person_not_on_disk_is_an_error_even_beside_one_not_selected(crops, write, tmp_path):
    root = crops({"Ann": 2, "Bob": 2})
    (tmp_path / "people.txt").write_text("Ann\n")
    with pytest.raises(PairsError, match=r"^1 of 4 pairs .*first: Cem/Cem_0001"):
        resolve_pairs(read_lfw_pairs(write(LIST)), ImageFolder(root, tmp_path / "people.txt"))


def test_flat_folder_cannot_resolve_names(crops, write):
    flat = ImageFolder(crops({"Ann": 2}) / "Ann")
    with pytest.raises(PairsError, match="is flat"):
        resolve_pairs(read_lfw_pairs(write(LIST)), flat)


@pytest.mark.faces
@pytest.mark.parametrize(("people", "kept"), [(None, 6000), ("first-half", 2249), ("second-half", 2194)])
def test_lfw_protocol_resolves(faces, people, kept):
    pairs = read_lfw_pairs(faces / "data" / "lfw_pairs.txt")
    resolved = resolve_pairs(pairs, ImageFolder(faces / "data" / "lfw", people))
    assert (len(resolved), resolved.dropped) == (kept, 6000 - kept)
    assert np.unique(resolved.fold).tolist() == list(range(10))
