"""What a user gets wrong is told in a line by every benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.scripts import run


def refusal(name: str, *arguments: object) -> str:
    """The line of a benchmark that was refused."""
    result = run(name, *arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("name", ["accuracy", "pruning", "training_time", "lfw"])
def test_a_folder_of_faces_that_is_missing(name: str, tmp_path: Path) -> None:
    assert "nowhere" in refusal(name, "--data", tmp_path / "nowhere", "-o", tmp_path / "runs")


def test_weights_that_are_missing(data: Path) -> None:
    options = ("--data", data, "-o", data.parent / "runs")
    assert "no file" in refusal("pruning", *options, "--network", "iresnet18")
    assert "no weights" in refusal("accuracy", *options, "--networks", "iresnet18")
    assert "no file" in refusal("lfw", *options, "--weights", "weights/none.safetensors")


@pytest.mark.parametrize("name", ["latency", "lfw", "training_time", "qat_step"])
def test_bits_that_are_out_of_range(name: str, data: Path) -> None:
    options = ["--data", data, "--bits", "9"]
    options += [] if name == "lfw" else ["--network" if name == "qat_step" else "--networks", "mobilefacenet"]
    options += [] if name == "qat_step" else ["-o", data.parent / "runs"]
    assert "9" in refusal(name, *options)


@pytest.mark.parametrize("name", ["accuracy", "pruning", "training_time", "lfw", "latency"])
def test_an_output_folder_that_is_a_file(name: str, data: Path) -> None:
    (data.parent / "taken").touch()
    assert "taken" in refusal(name, "--data", data, "-o", data.parent / "taken")
