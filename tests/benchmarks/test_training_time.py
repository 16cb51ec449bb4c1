from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qface
from tests.benchmarks.scripts import run


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
