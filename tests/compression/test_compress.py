"""``compress``: the smallest file that keeps a target, judged on people apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qface
from qface import CompressConfig, CompressionTarget, DistillConfig
from qface.cli import main
from qface.compression.run_record import RunRecord
from qface.compression.trials import smallest_passing
from qface.errors import ConfigError, QFaceError
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.networks import tiny_face_net

Crops = Callable[..., Path]

QUICK = CompressConfig(
    distill="never", sensitivity_images=4, calibration_images=16, training=DistillConfig(max_steps=2, batch_size=4)
)


@pytest.fixture
def folder(crops: Crops) -> Path:
    """Twelve people of six random crops each: six tune, six judge with 540 impostor pairs."""
    return crops({f"person_{number:02d}": 6 for number in range(12)})


def network() -> nn.Module:
    size = Preprocessing(size=(48, 48), std=(128.0,) * 3)
    return with_preprocessing(tiny_face_net(size=size.size), size)


@given(st.integers(1, 30), st.integers(0, 30))
def test_the_bisection_finds_the_first_that_passes(count: int, first: int) -> None:
    asked: list[int] = []

    def passes(number: int) -> bool:
        asked.append(number)
        return number >= first

    assert smallest_passing(count, passes) == (first if first < count else None)
    assert len(asked) == len(set(asked)) <= count.bit_length() + 1


def test_the_smallest_file_that_keeps_the_drop_is_written(folder: Path, tmp_path: Path) -> None:
    target = CompressionTarget(max_drop=30.0, at_fpr="1e-1")
    found = qface.compress(network(), folder, tmp_path / "small.onnx", target, QUICK)
    assert found.chosen is not None and found.chosen.keeps
    assert found.chosen.drop_bound <= 30
    assert all(trial.mb >= found.chosen.mb for trial in found.trials if trial.keeps)
    assert (tmp_path / "small.onnx").stat().st_size == pytest.approx(found.chosen.mb * 1e6)
    # the figure is that of an evaluation on the people who did not tune
    evaluated = qface.evaluate(tmp_path / "small.onnx", folder, identities="second-half")
    assert found.chosen.tpr == pytest.approx(100 * (evaluated.tpr_at_fpr["1e-1"] or 0))
    card = qface.model_card(tmp_path / "small.onnx", found.figures())
    assert f"TPR {found.chosen.tpr:.2f} % at FPR 1e-1 on 36 images of 6 people" in card
    assert f"at most {found.chosen.drop_bound:.2f}." in card
    assert "images of the folder crops, 6 people (first-half)" in card
    # a second call makes nothing anew, and says the same
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "small.run").rglob("student.onnx")}
    assert qface.compress(network(), folder, tmp_path / "small.onnx", target, QUICK) == found
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "small.run").rglob("student.onnx")}
    record = RunRecord.read(tmp_path / "small.run")
    assert Path(record.file) == tmp_path / "small.onnx"
    assert record.stopped == found.stopped and len(record.trials) == len(found.trials)
    # another network is not compressed in its folder
    other = network()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ConfigError, match="run of another weights"):
        qface.compress(other, folder, tmp_path / "small.onnx", target, QUICK)


def test_a_target_that_nothing_keeps_writes_no_file_and_says_why(folder: Path, tmp_path: Path) -> None:
    arguments = ["compress", "tests.compression.test_compress:network", "--images", str(folder), "--json"]
    arguments += ["--max-drop", "0.001", "--max-mb", "0.03", "--at-fpr", "1e-1", "--distill", "never"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "small.onnx")])
    if result.exit_code == 2:  # two bits everywhere do not fit
        assert "raise the budget" in result.stderr
        return
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["chosen"] is None
    assert "no file was written" in result.stderr
    assert not (tmp_path / "small.onnx").exists()


def test_within_a_size_the_best_file_is_trained(folder: Path, tmp_path: Path) -> None:
    config = CompressConfig(sensitivity_images=4, calibration_images=16, training=QUICK.training)
    target = CompressionTarget(max_mb=10.0, at_fpr="1e-1")
    found = qface.compress(network(), folder, tmp_path / "best.onnx", target, config)
    assert found.chosen is not None
    assert found.chosen.distilled and found.chosen.weight_bits == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize(
    ("target", "people", "message"),
    [
        (CompressionTarget(max_drop=1.0), (None, None), "FPR 1e-4 needs 100,000 impostor pairs.*judge at 1e-1"),
        (CompressionTarget(max_drop=1.0), ("first-half", None), "are given together"),
        (CompressionTarget(max_drop=1.0), ("first-half", "first-half"), "are to tune and to judge"),
        (CompressionTarget(max_ms=1e-6, at_fpr="1e-1"), (None, None), "raise max_ms, or allow pruning"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    folder: Path, tmp_path: Path, target: CompressionTarget, people: tuple[str | None, str | None], message: str
) -> None:
    with pytest.raises(QFaceError, match=message):
        qface.compress(network(), folder, tmp_path / "small.onnx", target, QUICK, *people)
    assert not (tmp_path / "small.onnx").exists()


def test_a_target_without_limits_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one of max_drop, max_mb and max_ms"):
        CompressionTarget()
