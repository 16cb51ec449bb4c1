"""The preprocessing that a user states reaches the evaluation of a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.data import ImageFolder
from qface.evaluation import embed
from qface.evaluation.embedding import as_embedder
from qface.evaluation.score_histogram import score_histogram
from tests.small_record import write_record

OPTIONS = ("--color", "BGR", "--mean", "100", "--std", "90", "--crop", "0,8,112,104")
GIVEN: dict[str, Any] = {"color": "BGR", "mean": (100,) * 3, "std": (90,) * 3, "crop": (0, 8, 112, 104)}


@pytest.fixture
def record(tmp_path: Path, crops: Callable[..., Path]) -> qface.RunRecord:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    return write_record(tmp_path, crops)


def report(record: qface.RunRecord, page: Path, *options: str) -> dict[str, Any]:
    inputs = [
        word for name in ("teacher", "student", "file", "images") for word in (f"--{name}", getattr(record, name))
    ]
    settings = ["--fpr", "1e-1", "--latency-runs", "1", "--bootstrap", "0", "--no-faces", "--json"]
    result = CliRunner().invoke(main, ["report", *inputs, *options, *settings, "-o", str(page)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def histogram(model: str, folder: ImageFolder, given: dict[str, Any]) -> Any:
    assert folder.labels is not None
    found = score_histogram(embed(as_embedder(model, given), folder), folder.labels)
    return json.loads(json.dumps(asdict(found)))


@pytest.mark.parametrize("is_onnx", [False, True], ids=["network", "onnx"])
def test_the_options_are_those_of_the_teacher(is_onnx: bool, record: qface.RunRecord, tmp_path: Path) -> None:
    if is_onnx:
        record = replace(record, teacher=str(qface.export(record.teacher, tmp_path / "teacher.onnx")))
    folder = ImageFolder(record.images)
    stated = report(record, tmp_path / "stated.html", *OPTIONS)["models"]
    assert stated[0]["preprocessing"].startswith("BGR 112x112 of the crop 0,8,112,104, mean 100, std 90")
    assert stated[0]["histogram"] == histogram(record.teacher, folder, GIVEN)
    assert stated[0]["histogram"] != histogram(record.teacher, folder, {})
    assert stated[1]["histogram"] == histogram(record.file, folder, {})
    assert "BGR" not in stated[1]["preprocessing"]


def test_a_run_folder_takes_them_too(record: qface.RunRecord, tmp_path: Path) -> None:
    record.write(tmp_path / "small.run")
    command = ["report", str(tmp_path / "small.run"), "--color", "BGR", "--latency-runs", "0", "--bootstrap", "0"]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "page.html"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"][0]["preprocessing"].startswith("BGR")
