from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.data import ARCFACE_LANDMARKS, read_landmarks
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
    path.write_text(f"b.jpg {NUMBERS}\na.jpg " + " ".join(map(repr, numbers)))  # the first line shows the order
    _, face = read_landmarks(path)
    assert [*face.points.ravel().tolist(), face.score] == numbers


FACES = [  # as in mtcnn's README, and a smaller one before it
    {
        "box": [0, 0, 20, 20],
        "keypoints": dict.fromkeys(("nose", "mouth_right", "right_eye", "left_eye", "mouth_left"), (7, 8)),
        "confidence": 0.99,
    },
    {
        "box": [277, 90, 48, 63],
        "keypoints": {
            "nose": (303, 131),
            "mouth_right": (313, 141),
            "right_eye": (314, 114),
            "left_eye": (291, 117),
            "mouth_left": (296, 143),
        },
        "confidence": 0.9985,
    },
]
LARGEST = [[291, 117], [314, 114], [303, 131], [296, 143], [313, 141]]
OF_MTCNN = {
    "as printed": f"ivan [1] x.jpg {FACES}\nempty.jpg []\n",
    "as JSON in a line": f"ivan [1] x.jpg\t{json.dumps(FACES)}\n",
    "one face": f"ivan [1] x.jpg {FACES[1]}\n",
    "a JSON object": json.dumps({"ivan [1] x.jpg": FACES, "empty.jpg": []}, indent=1),
}


@pytest.mark.parametrize("text", OF_MTCNN.values(), ids=OF_MTCNN.keys())
def test_dictionaries_of_mtcnn(text: str, tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text(text)
    (face,) = read_landmarks(path)
    assert (face.file, face.points.tolist(), face.score) == ("ivan [1] x.jpg", LARGEST, 0.9985)


NO_DICTIONARIES = {
    "a key is missing": "a.jpg [{'box': [0, 0, 9, 9], 'confidence': 0.9}]",
    "a point is missing": f"a.jpg {FACES[1]}".replace("'nose': (303, 131), ", ""),
    "a point of three numbers": f"a.jpg {FACES[1]}".replace("303, 131", "303, 131, 5"),
    "it ends early": f"a.jpg {FACES[1]}"[:-40],
    "too large a number": f"a.jpg {FACES[1]}".replace("303", "9" * 400),
    "no number": f"a.jpg {FACES[1]}".replace("303", "NaN"),
    "an object of numbers": json.dumps({"a.jpg": 5}),
    "no whole object": json.dumps({"a.jpg": FACES})[:-9],
}


@pytest.mark.parametrize("text", NO_DICTIONARIES.values(), ids=NO_DICTIONARIES.keys())
def test_malformed_dictionaries_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text(text)
    with pytest.raises(ImagesError, match=r"points.txt(, line 1|, a.jpg)?.*: (expected box, keypoints|write it again)"):
        read_landmarks(path)


@settings(max_examples=50)
@given(
    lines=st.integers(1, 4),
    width=st.floats(0.7, 1),
    roll=st.floats(-45, 45),
    size=st.floats(0.3, 20),
    seed=st.integers(0, 10**6),
)
def test_coordinates_may_stand_by_axis(
    tmp_path_factory: pytest.TempPathFactory, lines: int, width: float, roll: float, size: float, seed: int
) -> None:
    turn = np.radians(roll)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    noise = np.random.default_rng(seed).uniform(-1.5, 1.5, (5, 2))
    points = 3000 + size * ((ARCFACE_LANDMARKS - 56 + noise) * [width, 1]) @ rotation.T
    folder = tmp_path_factory.mktemp("points")
    orders = {"pairs.txt": points, "axes.txt": points.T}
    for name, values in orders.items():
        (folder / name).write_text(("a.jpg " + " ".join(map(repr, values.ravel().tolist())) + "\n") * lines)
        np.testing.assert_array_equal([face.points for face in read_landmarks(folder / name)], [points] * lines)


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
    with pytest.raises(ImagesError, match="has no landmarks"):
        read_landmarks(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ImagesError, match="cannot be read as text"):
        read_landmarks(tmp_path / "bytes.txt")
