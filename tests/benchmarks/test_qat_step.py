from __future__ import annotations

import json
from pathlib import Path

import qface
from tests.benchmarks.scripts import run
from tests.networks import tiny_face_net


def test_steps_are_timed_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    qface.save(tiny_face_net(), tmp_path / "weights" / "mobilefacenet_112x96.safetensors")
    options = ("--data", tmp_path, "--batch-size", "2", "--repeats", "1", "--json", tmp_path / "steps.json")
    result = run("qat_step", *options)
    assert result.exit_code == 0, result.output
    entry = json.loads((tmp_path / "steps.json").read_text())[0]
    assert entry["device"] == "cpu"
    assert list(entry["seconds"]) == [
        *("float step", "float step, bfloat16", "QAT step", "QAT step, bfloat16", "teacher's forward")
    ]
    assert list(entry["seconds_with_channels_first"]) == ["float step", "QAT step"]
    assert all(seconds > 0 for seconds in entry["seconds"].values())
    assert "of the float step" in result.output
