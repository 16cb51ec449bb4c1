from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import run


def test_each_number_of_images_is_measured_and_a_million_extrapolated(tmp_path: Path) -> None:
    numbers = ("--images", "2000", "--images", "1000", "--dimensions", "16")
    result = run("scale", *numbers, "--run-dir", tmp_path / "run", "--json", tmp_path / "scale.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "scale.json").read_text())
    assert [row["images"] for row in rows] == [1000, 2000, 1_000_000]
    assert [row["extrapolated"] for row in rows] == [False, False, True]
    assert rows[1]["tpr"]["1e-3"] > rows[1]["tpr"]["1e-4"] > 0
    assert rows[1]["tpr"]["1e-6"] is None  # 2e6 impostor pairs are too few
    assert rows[2]["seconds"] == pytest.approx(rows[1]["seconds"] * (1e6 / 2000) ** 2, rel=1e-3)
    assert "1,000,000 (extrapolated)" in result.output
    assert len(list((tmp_path / "run").glob("*/scores-0-of-1/counts.npz"))) == 2
