from __future__ import annotations

import json
from pathlib import Path

import pytest

import qface
from qface.data import ImageFolder
from tests.benchmarks.scripts import run


def test_the_host_equals_itself_and_what_is_missing_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFACE_RUNTIMES", str(tmp_path / "none"))
    teacher = qface.load(data / "weights" / "mobilefacenet_112x96.safetensors")
    crops = ImageFolder(data / "data" / "lfw", identities="first-half").read(range(8))
    student = qface.calibrate(qface.quantize(teacher, 6), crops)
    file = qface.export(student, tmp_path / "student.onnx", input="uint8")
    float_file = qface.export(teacher, tmp_path / "float.onnx")

    page, options = tmp_path / "table.md", ("--runtimes", "host", "--runtimes", "web", "--images", "12", "--runs", "2")
    result = run("runtimes", file, "--float", float_file, "--data", data, *options, "--json", "-o", page)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    (row,) = report["rows"]
    assert (row["runtime"], row["equal"], row["images"]) == ("host", 12, 12)
    assert row["min_cosine"] == pytest.approx(1)
    assert row["milliseconds"] > 0 and row["float_milliseconds"] > 0
    assert report["notes"] == ["web is not set up: run make runtimes"]
    assert len({line.count("|") for line in page.read_text().splitlines()}) == 1
