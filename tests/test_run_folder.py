"""A run folder belongs to one run, and a damaged record of it is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qface.errors import CheckpointError, ConfigError, LimitError, QFaceError
from qface.run_folder import run_folder


def use(folder: Path, **inputs: object) -> None:
    with run_folder(folder, inputs):
        pass


def test_a_folder_takes_its_own_inputs_only(tmp_path: Path) -> None:
    use(tmp_path / "run", images="a", bits=6)
    use(tmp_path / "run", images="a", bits=6)
    with pytest.raises(ConfigError, match="belongs to a run with different images"):
        use(tmp_path / "run", images="b", bits=6)
    with pytest.raises(ConfigError, match="belongs to a run of another function"):
        use(tmp_path / "run", images="a")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"images": Infinity}', "\xff", "[" * 100_000])
def test_a_damaged_record_is_one_line(text: str, tmp_path: Path) -> None:
    use(tmp_path, images="a")
    (tmp_path / ".inputs.json").write_bytes(text.encode("latin-1"))
    with pytest.raises((CheckpointError, ConfigError, LimitError)) as error:
        use(tmp_path, images="a")
    assert ".inputs.json" in str(error.value) or str(tmp_path) in str(error.value)


def test_a_folder_without_state_is_taken_over(tmp_path: Path) -> None:
    with run_folder(tmp_path, {"images": "a"}, "state.pt"):
        pass
    with run_folder(tmp_path, {"images": "b"}, "state.pt"):
        (tmp_path / "state.pt").touch()
    assert json.loads((tmp_path / ".inputs.json").read_text()) == {"images": "b"}
    with pytest.raises(QFaceError), run_folder(tmp_path, {"images": "a"}, "state.pt"):
        pass
