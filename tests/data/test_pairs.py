import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qface.data import ImageFolder, read_lfw_pairs, read_pairs, resolve_pairs
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
    assert pairs.first == ["Ann/Ann_0001", "Ann/Ann_0002", "Bob/Bob_0001", "Bob/Bob_0002"]
    assert pairs.second == ["Ann/Ann_0002", "Bob/Bob_0001", "Bob/Bob_0002", "Cem/Cem_0001"]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]
    assert len(pairs) == 4


def test_single_number_is_one_fold(write):
    pairs = read_lfw_pairs(write("2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t1\nAnn\t2\tBob\t2\n"))
    assert pairs.fold.tolist() == [0] * 4
    assert pairs.same.tolist() == [True, True, False, False]


def test_blanks_separate_where_there_are_no_tabs_and_blank_lines_do_not_count(write):
    assert read_lfw_pairs(write("1 1\n\nAnn 1 2\nAnn 1  Bob 2\n\n")).second == ["Ann/Ann_0002", "Bob/Bob_0002"]


def test_a_tab_at_the_end_of_a_line_begins_no_field(write):
    pairs = read_lfw_pairs(write("1\t\nAnn Lee\t1\t2\t\nAnn Lee\t1\tBob\t2\t\n"))
    assert pairs.second == ["Ann Lee/Ann Lee_0002", "Bob/Bob_0002"]


def test_names_may_hold_blanks_between_tabs(write):
    assert read_lfw_pairs(write("1\nAnn Lee\t1\t2\nAnn Lee\t1\tBob\t2\n")).first[0] == "Ann Lee/Ann Lee_0001"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(folds=st.integers(1, 4), per_fold=st.integers(1, 4), data=st.data())
def test_reads_what_was_written(write, folds, per_fold, data):
    number = st.integers(1, 9999)
    lines = []
    for _ in range(folds):
        lines += [f"A\t{data.draw(number)}\t{data.draw(number)}" for _ in range(per_fold)]
        lines += [f"A\t{data.draw(number)}\tB\t{data.draw(number)}" for _ in range(per_fold)]
    pairs = read_lfw_pairs(write("\n".join([f"{folds}\t{per_fold}", *lines])))
    named = [(line.split("\t")[0], line.split("\t")[1], line.split("\t")[-2], line.split("\t")[-1]) for line in lines]
    assert pairs.first == [f"{a}/{a}_{int(i):04d}" for a, i, _, _ in named]
    second = [b if not same else a for (a, _, b, _), same in zip(named, pairs.same, strict=True)]
    assert pairs.second == [f"{b}/{b}_{int(j):04d}" for b, (*_, j) in zip(second, named, strict=True)]
    assert np.array_equal(pairs.fold, np.repeat(np.arange(folds), 2 * per_fold))


@pytest.mark.parametrize("header", ["", "x", "1\t2\t3", "0\t1", "-1", "1.5\t2", "9" * 5000])
def test_malformed_header_is_an_error(write, header):
    assert "line 1: expected" in message(write(header + "\nAnn\t1\t2\nAnn\t1\tBob\t1\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\nAnn\t1\nAnn\t1\tBob\t1\n", "line 2: expected a genuine pair"),
        ("1\n\nAnn\t1\tBob\t1\nAnn\t1\t2\n", "line 3: expected a genuine pair"),
        ("1\nAnn\t1\t2\nAnn\t1\t2\n", "line 3: expected an impostor pair"),
        ("1\nAnn\t1\tx\nAnn\t1\tBob\t1\n", "line 2: expected a genuine pair"),
        (f"1\nAnn\t1\t{'9' * 5000}\nAnn\t1\tBob\t1\n", "line 2: expected a genuine pair"),
        ("1\nAnn\t0\t1\nAnn\t1\tBob\t1\n", "line 2: expected a genuine pair"),
        ("1\nAnn\t1\t2\nAnn\t1\tBob\tx\n", "line 3: expected an impostor pair"),
    ],
)
def test_malformed_lines_are_named(write, text, expected):
    assert expected in message(write(text))


@pytest.mark.parametrize("text", [LIST + "Ann\t1\t2\n", LIST[: LIST.rindex("Bob")], "2\t1\n"])
def test_wrong_number_of_pairs_is_an_error(write, text):
    assert "header says 4" in message(write(text))


def test_missing_and_binary_files_are_errors(tmp_path):
    assert "there is no file" in message(tmp_path / "none.txt")
    assert "cannot be read as text" in message(tmp_path / "a\0b.txt")
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
    with pytest.raises(PairsError, match="has no subfolders"):
        resolve_pairs(read_lfw_pairs(write(LIST)), flat)


# SLLFW, CALFW and CPLFW


def two_lines_each(same: list[bool], line) -> str:
    """A list of pairs, the lines of each by ``line(pair, position, same)``."""
    return "".join(line(pair, at, one) + "\n" for pair, one in enumerate(same) for at in (0, 1))


def sllfw_line(pair, at, same):
    name = f"P{pair:02}" if same or not at else "Other"
    return f"{name}/{name}_{at + 1:04d}.jpg"


def calfw_line(pair, at, same):
    return f"P{pair:02}_{at + 1:04d}.jpg {(pair % 10 + 1) if same else 0}"


def test_sllfw_tells_people_by_folders(write):
    pairs = read_pairs(write(two_lines_each([True, False] * 20, sllfw_line)))
    assert pairs.first[:2] == ["P00/P00_0001", "P01/P01_0001"]
    assert pairs.second[:2] == ["P00/P00_0002", "Other/Other_0002"]
    assert pairs.same.tolist() == [True, False] * 20
    assert pairs.fold.tolist() == [fold for fold in range(10) for _ in range(4)]


def test_calfw_tells_people_by_numbers_wherever_they_stand(write):
    pairs = read_pairs(write(two_lines_each([True] * 20 + [False] * 10, calfw_line)))
    assert pairs.first[21] == "P21_0001"
    assert pairs.second[21] == "P21_0002"
    assert pairs.same.tolist() == [True] * 20 + [False] * 10
    assert pairs.fold.tolist() == [fold for fold in range(10) for _ in (0, 1)] + list(range(10))


def test_files_are_found_in_a_flat_folder_with_any_ending(crops, write):
    flat = ImageFolder(crops({"P00": 2}) / "P00")
    listed = write(two_lines_each([True], calfw_line))
    resolved = resolve_pairs(read_pairs(listed), flat)
    assert [flat.paths[i].stem for i in (resolved.first[0], resolved.second[0])] == ["P00_0001", "P00_0002"]
    with pytest.raises(PairsError, match=r"^1 of 2 pairs .*P01_0001"):
        resolve_pairs(read_pairs(write(two_lines_each([True, False], calfw_line))), flat)
    with pytest.raises(PairsError, match="has subfolders"):
        resolve_pairs(read_pairs(listed), ImageFolder(flat.root.parent))


def test_lfw_is_still_told_by_its_header(write):
    assert read_pairs(write(LIST)).first == read_lfw_pairs(write(LIST)).first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A/A_0001.jpg\nA/A_0002.jpg\nB/B_0001.jpg\n", "3 lines"),
        ("A/A_0001.jpg\nA_0002.jpg\n", "line 2: expected 'name/"),
        ("A_0001.jpg 1\nA_0002.jpg\n", "line 2: expected 'name_0001.jpg' and"),
        ("A_0001.jpg 1\nA_0002.jpg x\n", "line 2"),
        (f"A_0001.jpg {'9' * 5000}\nA_0002.jpg {'9' * 5000}\n", "line 1: expected 'name_0001.jpg' and"),
        ("A_0001.jpg 1\nA_0002.jpg 0\n", "pair 1 have different numbers"),
        ("A_0001.jpg 1\n", "1 lines"),
        ("", "line 1: expected 'folds"),
    ],
)
def test_malformed_lists_of_files_are_named(write, text, expected):
    with pytest.raises(PairsError) as error:
        read_pairs(write(text))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.faces
@pytest.mark.parametrize(("identities", "kept"), [(None, 6000), ("first-half", 2249), ("second-half", 2194)])
def test_lfw_protocol_resolves(faces, identities, kept):
    pairs = read_lfw_pairs(faces / "data" / "lfw_pairs.txt")
    resolved = resolve_pairs(pairs, ImageFolder(faces / "data" / "lfw", identities))
    assert (len(resolved), resolved.dropped) == (kept, 6000 - kept)
    assert np.unique(resolved.fold).tolist() == list(range(10))


# CSV

FLAGGED = [("Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg", "1"), ("Ann/Ann_0001.jpg", "Bob/Bob_0001.jpg", "0")]


@pytest.mark.parametrize("different", ["0", "-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", ", "])
@pytest.mark.parametrize("header", ["", "path1{0}path2{0}same\n"])
@pytest.mark.parametrize("flag_at", [0, 2])
def test_paths_and_a_flag(write, crops, header, delimiter, different, flag_at):
    rows = []
    for first, second, flag in FLAGGED:
        row = [first, second]
        row.insert(flag_at, flag if flag == "1" else different)
        rows.append(delimiter.join(row))
    pairs = read_pairs(write(header.format(delimiter) + "\n".join(rows) + "\n"))
    assert pairs.first == ["Ann/Ann_0001"] * 2 and pairs.second == ["Ann/Ann_0002", "Bob/Bob_0001"]
    assert pairs.same.tolist() == [True, False] and pairs.fold.tolist() == [0, 0]
    folder = ImageFolder(crops({"Ann": 2, "Bob": 1}))
    assert resolve_pairs(pairs, folder).second.tolist() == [1, 2]


@pytest.mark.parametrize("line", ["a," * 900 + "1", "a,b," + "c" * 200_000, "a,b,1,0,0"])
def test_long_lines_are_refused_in_a_short_line(write, line):
    with pytest.raises(PairsError) as error:
        read_pairs(write(f"a,b,1\n{line}\n"))
    assert len(str(error.value)) < 2500


def test_names_of_files_may_hold_blanks_and_quotes_in_a_csv(write):
    pairs = read_pairs(write('"a, b/1.png",./c d/2.png,1\nx\\y.png,z/3.png,-1\n'))
    assert pairs.first == ["a, b/1", "x/y"] and pairs.second == ["c d/2", "z/3"]


@pytest.mark.parametrize("text", ["a,b,1\nc,d,2\n", "a,b,1\nc,d\n", "a,b,same\n", "a.png b.png 1\nc.png 1\n"])
def test_malformed_csvs_are_named(write, text):
    with pytest.raises(PairsError, match="path,path,flag") as error:
        read_pairs(write(text))
    assert "\n" not in str(error.value)
