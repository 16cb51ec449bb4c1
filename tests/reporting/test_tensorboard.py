"""Event files, read by TensorBoard itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.errors import ConfigError, DependencyError
from tests.networks import random_faces, tiny_face_net

Scalars = dict[str, dict[int, float]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two steps."""
    pytest.importorskip("tensorboardX")
    return trained(tmp_path / "run", 2)


def trained(folder: Path, steps: int) -> Path:
    """Train for ``steps`` in all, or go on to them, and return the run folder."""
    config = qface.DistillConfig(max_steps=steps, batch_size=4, device="cpu")
    student = qface.calibrate(qface.quantize(tiny_face_net()), random_faces(4))
    qface.distill(student, tiny_face_net(), random_faces(16), config, folder, resume=folder.exists())
    return folder


def scalars(folder: Path) -> Scalars:
    """The points that TensorBoard shows for ``folder``; a step that is there twice fails."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder)).Reload()
    found: Scalars = {}
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        found[tag] = dict(points)
        assert len(found[tag]) == len(points), tag
    return found


def logged(run: Path) -> Scalars:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name != "step"]
    return {name: {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows} for name in names}


def test_tensorboard_reads_each_value_of_the_log(run: Path, tmp_path: Path) -> None:
    file = qface.write_tensorboard(run, tmp_path / "events" / "one")
    assert list((tmp_path / "events" / "one").iterdir()) == [file]
    found = scalars(file.parent)
    assert {"loss", "learning_rate", "gradient_norm"} < found.keys()
    assert found == logged(run)


def test_a_resumed_run_has_no_point_twice(run: Path, tmp_path: Path) -> None:
    qface.write_tensorboard(run, tmp_path / "events")
    trained(run, 4)
    qface.write_tensorboard(run, tmp_path / "events")
    found = scalars(tmp_path / "events")
    assert list(found["loss"]) == [0, 1, 2, 3]
    assert found == logged(run)


def test_the_log_of_a_compression_is_found_and_the_command_says_what_it_wrote(run: Path, tmp_path: Path) -> None:
    record = qface.RunRecord("teacher", "student", "file", "faces", log=str(run / "log.jsonl"))
    record.write(tmp_path / "small.run")
    events = tmp_path / "events"
    result = CliRunner().invoke(main, ["tensorboard", str(tmp_path / "small.run"), "-o", str(events), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert Path(printed["output"]).stat().st_size == printed["bytes"]
    assert Path(printed["output"]).read_bytes() == qface.write_tensorboard(run, tmp_path / "other").read_bytes()


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.jsonl").write_text('{"step": 0, "loss": 1.0, "learning_rate": "high"}\n')
    with pytest.raises(ConfigError, match="is not a log of a distillation"):
        qface.write_tensorboard(tmp_path / "words.jsonl", tmp_path / "events")
    with pytest.raises(ConfigError, match="cannot be read"):
        qface.write_tensorboard(tmp_path / "none.jsonl", tmp_path / "events")
    assert not (tmp_path / "events").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    result = CliRunner().invoke(main, ["tensorboard", str(run), "-o", str(tmp_path / "events")])
    assert result.exit_code == 2
    assert result.stderr == "Error: event files need tensorboardX: pip install 'qface[tensorboard]'\n"
    with pytest.raises(DependencyError):
        qface.write_tensorboard(run, tmp_path / "events")
