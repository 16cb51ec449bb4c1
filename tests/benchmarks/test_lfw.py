from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import qface
from qface.provenance import provenance_of
from tests.benchmarks.scripts import run, script


def measure(data: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    """What the command prints, and what it writes."""
    result = run("lfw", "--data", data, "-o", data.parent / "lfw", "--json", data.parent / "lfw.json", *arguments)
    return result, json.loads((data.parent / "lfw.json").read_text())


def test_few_people_are_measured_to_the_end(data: Path) -> None:
    result, report = measure(data)
    assert result.exit_code == 0, result.output
    assert report["agreement"]["images"] == 24 * 4
    assert [row["model"] for row in report["rows"]] == [
        *("teacher", "calibrated, torch", "calibrated, file", "distilled, torch", "distilled, file"),
        "distilled, file, against the teacher's gallery",
    ]
    assert {row["tpr_at_fpr"]["1e-5"] for row in report["rows"]} == {None}
    assert " - " in result.stdout


def test_figures_are_written_before_they_are_shown(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    script("lfw")  # which makes its neighbors known
    monkeypatch.setattr("harness.report_files.terminal_table", killed)
    result, report = measure(data)
    assert result.exit_code == 1
    assert report["rows"]


@pytest.mark.parametrize("recipe", ["qface", "paper"])
def test_recipes_are_those_of_the_accuracy_table(recipe: str, data: Path) -> None:
    measure(data, "--recipe", recipe, "--bits", "4")
    steps = {step["step"]: step for step in provenance_of(qface.load(data.parent / "lfw" / "student.safetensors"))}
    ours = recipe == "qface"
    assert steps["quantize"]["weight_bits"] == steps["quantize"]["activation_bits"] == 4
    assert (
        steps["quantize"]["weight_observer"]
        == steps["quantize"]["activation_observer"]
        == ("mse" if ours else "minmax")
    )
    assert steps["quantize"]["wide_residuals"] == steps["calibrate"]["gptq"] == ours
    assert steps["distill"]["batch_size"] == (16 if ours else 64)
    assert steps["distill"]["losses"]["reference_ekd"] != ours
