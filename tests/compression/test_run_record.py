from __future__ import annotations

import json
from pathlib import Path

import pytest

from qface.compression.run_record import RunRecord
from qface.errors import ConfigError


def test_a_record_is_found_again_when_its_folder_has_moved(tmp_path: Path) -> None:
    run, faces = tmp_path / "run", tmp_path / "faces"
    for folder in (run, faces):
        folder.mkdir()
    for name in ("student.safetensors", "student.onnx", "sensitivity.json"):
        (run / name).touch()
    record = RunRecord(
        teacher="mobilefacenet",
        student=str(run / "student.safetensors"),
        file=str(run / "student.onnx"),
        images=str(faces),
        tuning_people="first-half",
        sensitivity=str(run / "sensitivity.json"),
        trials=({"bits": 6, "kept": True},),
        stopped="The budget was met.",
    )
    written = json.loads(record.write(run).read_text())
    assert written["student"] == "student.safetensors"
    assert written["images"] == str(faces)
    assert RunRecord.read(run) == record

    run.rename(tmp_path / "moved")
    moved = RunRecord.read(tmp_path / "moved")
    assert moved.file == str(tmp_path / "moved" / "student.onnx")
    assert (moved.teacher, moved.tuning_people, moved.pairs) == ("mobilefacenet", "first-half", None)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema_version": 2}', '{"schema_version": 1, "teacher": 3}', '{"schema_version": 1}']
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        RunRecord.read(tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no run\.json"):
        RunRecord.read(tmp_path)
