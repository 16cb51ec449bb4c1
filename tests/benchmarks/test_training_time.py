from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qface
from tests.benchmarks.scripts import run


def test_training_time(data: Path) -> None:
    files = ("--data", data, "-o", data.parent / "times", "--json", data.parent / "times.json")
    result = run("training_time", *files, "--steps", "1", "--rounds", "1", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((data.parent / "times.json").read_text())
    assert list(entry["seconds_a_step"]) == ["QuantFace", "qface, paper's recipe", "qface"]
    for loop, seconds in entry["seconds_a_step"].items():
        assert entry["images_a_second"][loop] == pytest.approx(4 / seconds)
        assert entry["minutes_an_epoch"][loop]["LFW"] == pytest.approx(13_233 // 4 * seconds / 60)
    assert "440 of it is the number of images" in result.output


def test_no_timed_step_of_quantface_searches_for_ranges(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill, seen = qface.distill, list[set[int]]()

    def observed(student: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        seen.append({int(value) for name, value in student.named_buffers() if name.endswith("quantAct.steps")})
        return distill(student, *arguments, **options)

    monkeypatch.setattr(qface, "distill", observed)
    options = ("--data", data, "-o", data.parent / "times", "--steps", "1", "--rounds", "2", "--batch-size", "4")
    result = run("training_time", *options)
    assert result.exit_code == 0, result.output
    assert [steps for steps in seen if steps] == [{0}, {299}, {299}]
