"""Only onnxruntime is a real tool here; the environments of the others are made up, so that nothing is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result

import qface
from qface.data import nested_subset
from tests.benchmarks.scripts import run, script

PEERS = script("peers")
TOOLS, Halves = sys.modules["peer_rows"].TOOLS, sys.modules["harness.held_out"].Halves

SIMULATES = """
import json, pathlib, sys
import numpy as np
inputs, folder = map(pathlib.Path, sys.argv[2:])
settings = json.loads((folder / "settings.json").read_text())
images = np.load(inputs / "images.npy")
np.save(folder / "embeddings.npy", images.reshape(len(images), -1)[:, :16] * settings["weight_bits"])
result = {"cpu_seconds": 3.0, "files": [], "latency_ratio": None, "versions": {"brevitas": "9.9"}}
(folder / "result.json").write_text(json.dumps(result))
"""
FAILS = "raise SystemExit('no such processor')"


@pytest.fixture
def environments(data: Path) -> Path:
    """A folder with an environment of onnxruntime, which is this one, and without any other."""
    root = data.parent / "environments"
    environment(root, "onnxruntime")
    return root


def environment(root: Path, method: str, program: str | None = None) -> None:
    """Make an environment whose Python is this one; with ``program``, it runs that instead of every script."""
    folder = root / method.lower()
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    instead = "" if program is None else f"{folder / 'program.py'} "
    (folder / "program.py").write_text(program or "")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {instead}"$@"\n')
    python.chmod(0o755)
    (folder / "requirements.json").write_text(json.dumps(TOOLS[method].requirements))


def measure(environments: Path, *rows: str) -> tuple[Result, dict[str, Any]]:
    """The result of the command, and the rows that it writes."""
    data, output = environments.parent / "shared", environments.parent / "runs"
    files = ("--environments", environments, "-o", output, "--json", output / "peers.json")
    chosen = (word for row in rows for word in ("--rows", row))
    result = run("peers", "--data", data, "--runs", "2", *files, *chosen)
    return result, json.loads((output / "peers.json").read_text())


def test_rows_are_those_of_the_files_and_are_measured_once(environments: Path) -> None:
    names = ("float", "onnxruntime-minmax-w8a8", "qface-w6a6")
    result, report = measure(environments, *names)
    assert result.exit_code == 0, result.output
    assert report["images"] == 24 * 4
    rows = {row["row"]: row["figures"] for row in report["rows"]}
    assert tuple(rows) == names
    assert rows["float"]["distance"] == pytest.approx(0, abs=1e-6) and rows["float"]["latency_ratio"] == 1
    for name in names[1:]:
        assert 0 < rows[name]["distance"] < 0.2
        assert rows[name]["cpu_seconds"] > 0 and rows[name]["latency_ratio"] > 0
    (quantized,) = (environments.parent / "runs").glob("*minmax*/model.onnx")
    assert rows["onnxruntime-minmax-w8a8"]["bytes"] == quantized.stat().st_size
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(quantized).graph.node}
    (ours,) = (environments.parent / "runs").glob("*qface-w6a6*.onnx")
    assert rows["qface-w6a6"]["bytes"] == ours.stat().st_size

    environment(environments, "onnxruntime", FAILS)
    again, same = measure(environments, *names)
    assert again.exit_code == 0
    assert same == report


def test_a_tool_that_fails_is_a_row_and_is_tried_again(environments: Path) -> None:
    environment(environments, "Brevitas", FAILS)
    (environments / "nncf").write_text("in the way")
    result, report = measure(environments, "float", "nncf-w8a8", "brevitas-w6a6")
    assert result.exit_code == 1
    assert [row.get("error", "") != "" for row in report["rows"]] == [False, True, True]
    assert "no such processor" in report["rows"][2]["error"]
    assert "brevitas-w6a6 failed: no such processor" in result.stderr
    assert "nncf-w8a8 failed: cannot create the folder" in result.stdout

    environment(environments, "Brevitas", SIMULATES)
    result, report = measure(environments, "float", "brevitas-w6a6")
    assert result.exit_code == 0, result.output
    figures = report["rows"][1]["figures"]
    assert (figures["bytes"], figures["latency_ratio"], figures["cpu_seconds"]) == (None, None, 3)
    assert "simulated" in result.stdout and "brevitas 9.9" in result.stdout


def test_all_methods_get_the_same_calibration_images(environments: Path, data: Path) -> None:
    measure(environments, "float")
    (folder,) = (environments.parent / "runs").glob("mobilefacenet-inputs-*")
    pixels = np.load(folder / "calibration.npy")
    tuning = qface.data.ImageFolder(data / "data" / "lfw", identities="first-half")
    crops = nested_subset(tuning, len(tuning), 0).read(range(len(tuning)))
    assert np.allclose(pixels, qface.Preprocessing().normalize(crops).numpy())


def test_a_part_of_the_people_is_each_nth_of_them(data: Path) -> None:
    every, some = Halves(data / "data"), Halves(data / "data", every=5)
    assert some.held_out.names == every.held_out.names[::5]
    assert len(some.held_out) == 5 * 4
    assert some.tuning.paths == every.tuning.paths


def test_training_is_an_option() -> None:
    plain, trained = ([row.name for row in PEERS.chosen([], distill)] for distill in (False, True))
    assert {name for name in trained if name not in plain} == {"quantface-one-epoch-w6a6", "qface-one-epoch-w6a6"}
    assert [row.name for row in PEERS.chosen(["qface-w6a6", "float"], False)] == ["float", "qface-w6a6"]


def test_a_loss_is_shown_with_its_interval() -> None:
    def row(method: str, tpr: float) -> dict[str, Any]:
        figures = {"tpr": dict.fromkeys(("1e-3", "1e-4", "1e-5"), tpr), "accuracy": 0.99, "distance": 0.01}
        figures |= {"drop_interval": [0.01, 0.04], "bytes": None, "cpu_seconds": None, "latency_ratio": None}
        return {"method": method, "label": method, "bits": "", "options": {}, "figures": {**figures, "versions": {}}}

    lines = sys.modules["peer_report"].markdown([row("float", 0.9), row("NNCF", 0.88)]).splitlines()
    assert "| float |  | TPR 90.00 | TPR 90.00 | TPR 90.00 |" in lines[2]
    assert "| NNCF |  | 2.00 | 2.00 (1.00 to 4.00) | 2.00 | 99.00 | 0.9900 | simulated |" in lines[3]
