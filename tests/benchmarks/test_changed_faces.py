from __future__ import annotations

import json
from pathlib import Path

from qface.data.stress import STRESS_CONDITIONS
from tests.benchmarks.scripts import run


def test_an_arm_is_judged_once_under_each_condition(data: Path, tmp_path: Path) -> None:
    output = ["-o", tmp_path / "runs", "--json", tmp_path / "figures.json"]
    options = ["--data", data, "--max-steps", "1", "--every", "4", "--arms", "geometry", *output]
    result = run("changed_faces", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "figures.json").read_text())["arms"]["geometry"]
    assert [each["condition"] for each in found["stress"]] == ["none", *STRESS_CONDITIONS]
    assert found["model"]["distance"] > 0 and found["teacher"]["distance"] < 1e-6
    (kept,) = (tmp_path / "runs").glob("*.json")
    written = kept.stat().st_mtime_ns
    assert run("changed_faces", *options).output == result.output
    assert kept.stat().st_mtime_ns == written
