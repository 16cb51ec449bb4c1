from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qface.data import read_landmarks
from qface.errors import ImagesError

NUMBERS = "46.060 62.026 87.785 60.323 68.851 81.314 55.072 112.222 82.838 111.121"


@pytest.mark.parametrize(("score", "expected"), [(" 0.9990", 0.999), ("", None)])
@pytest.mark.parametrize("name", ["1.jpg", "Ann/Ann 0001.jpg"])
def test_lines_of_ijb(name: str, score: str, expected: float | None, tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text(f"{name} {NUMBERS}{score}\n\nother.jpg {NUMBERS} 0.5\n")
    first, second = read_landmarks(path)
    assert (first.file, first.score) == (name, expected)
    np.testing.assert_array_equal(first.points[[0, 4]], [[46.06, 62.026], [82.838, 111.121]])
    assert (second.file, second.score) == ("other.jpg", 0.5)


@given(st.lists(st.floats(-1e4, 1e4), min_size=11, max_size=11))
def test_numbers_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, numbers: list[float]) -> None:
    path = tmp_path_factory.mktemp("points") / "points.txt"
    path.write_text("a.jpg " + " ".join(map(repr, numbers)))
    (face,) = read_landmarks(path)
    assert [*face.points.ravel().tolist(), face.score] == numbers


MALFORMED = {
    "no numbers": "a.jpg",
    "nine": f"a.jpg {NUMBERS[:-8]}",
    "no score": f"a.jpg {NUMBERS} nan",
    "no first coordinate": f"a.jpg nan {NUMBERS[7:]} 0.9",
    "an infinite one": f"a.jpg -inf {NUMBERS}",
    "words": "a.jpg " + "x " * 10,
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text(f"b.jpg {NUMBERS}\n{line}\n")
    with pytest.raises(ImagesError, match="line 2: expected"):
        read_landmarks(path)


def test_files_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="there is no file"):
        read_landmarks(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ImagesError, match="holds no landmarks"):
        read_landmarks(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ImagesError, match="cannot be read as text"):
        read_landmarks(tmp_path / "bytes.txt")
