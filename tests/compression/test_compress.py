"""``compress``: the smallest file that keeps a target, judged on people apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qface
from qface import CalibrationConfig, CompressConfig, CompressionTarget, DistillConfig
from qface.choices import DistillName
from qface.cli import main
from qface.compression.run_record import RunRecord
from qface.compression.trials import smallest_passing
from qface.data import ImageFolder
from qface.data.stress import STRESS_CONDITIONS, StressedImages
from qface.deployment.latency import Candidate
from qface.errors import ConfigError, QFaceError
from qface.evaluation import embed
from qface.evaluation.bootstrap import bootstrap_tpr_drop
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.provenance import provenance_of
from tests.networks import tiny_face_net

Crops = Callable[..., Path]

QUICK = CompressConfig(
    distill="never", calibration=CalibrationConfig(num_images=16), training=DistillConfig(max_steps=2, batch_size=4)
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
    assert not list((tmp_path / "small.run").rglob("calibration.pt"))  # students are kept, not their states
    record = RunRecord.read(tmp_path / "small.run")
    assert Path(record.file) == tmp_path / "small.onnx"
    assert record.stopped == found.stopped and len(record.trials) == len(found.trials)
    # another network is not compressed in its folder
    other = network()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ConfigError, match="run with different weights"):
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
    target = CompressionTarget(max_mb=10.0, at_fpr="1e-1")
    found = qface.compress(network(), folder, tmp_path / "best.onnx", target, replace(QUICK, distill="if-needed"))
    assert found.chosen is not None
    assert found.chosen.distilled and found.chosen.weight_bits == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize(
    ("target", "people", "message"),
    [
        (CompressionTarget(max_drop=1.0), (None, None), "FPR 1e-4 needs 100,000 impostor pairs.*use the FPR 1e-1"),
        (CompressionTarget(max_drop=1.0), ("first-half", None), "give both"),
        (CompressionTarget(max_drop=1.0), ("first-half", "first-half"), "are in both groups"),
        (CompressionTarget(max_ms=1e-6, at_fpr="1e-1"), (None, None), "raise max_ms, or allow pruning"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    folder: Path, tmp_path: Path, target: CompressionTarget, people: tuple[str | None, str | None], message: str
) -> None:
    with pytest.raises(QFaceError, match=message):
        qface.compress(network(), folder, tmp_path / "small.onnx", target, QUICK, *people)
    assert not (tmp_path / "small.onnx").exists()


def wide_network() -> nn.Module:
    """A network with enough channels to remove 16 of each layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, 4), nn.PReLU(64), nn.Conv2d(64, 64, 3, 4), nn.PReLU(64), nn.Conv2d(64, 16, 3)]
    size = Preprocessing(size=(48, 48), std=(128.0,) * 3)
    return with_preprocessing(nn.Sequential(*layers, nn.Flatten()).eval(), size)


def test_a_network_that_is_too_slow_is_pruned_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopwatch that shows the bytes of the file: fewer channels are faster, other processes are not."""

    def watched(candidates: Sequence[Candidate]) -> list[SimpleNamespace]:
        return [SimpleNamespace(median=candidate.bytes / 1000) for candidate in candidates]

    monkeypatch.setattr("qface.compression.timed_network.compare", watched)
    whole, pruned = replace(QUICK, weight_bits=8), replace(QUICK, weight_bits=8, prune=True, distill="if-needed")
    target = CompressionTarget(max_ms=1000.0, at_fpr="1e-1")
    (slow,) = qface.compress(wide_network(), folder, tmp_path / "slow.onnx", target, whole).trials
    assert slow.ms is not None and slow.keeps
    limit = CompressionTarget(max_ms=0.8 * slow.ms, at_fpr="1e-1")
    with pytest.raises(ConfigError, match="raise max_ms, or allow pruning"):
        qface.compress(wide_network(), folder, tmp_path / "none.onnx", limit, whole)
    with pytest.raises(ConfigError, match="raise max_ms, which removing 70% of channels misses"):
        qface.compress(wide_network(), folder, tmp_path / "no.onnx", replace(limit, max_ms=1e-6), pruned)
    found = qface.compress(wide_network(), folder, tmp_path / "fast.onnx", limit, pruned)
    assert found.chosen is not None and found.chosen.ms is not None
    assert 0.4 * slow.ms < found.chosen.ms <= 0.8 * slow.ms and found.chosen.mb < slow.mb
    kept = qface.load(tmp_path / "fast.run" / "pruned.safetensors")
    assert {layer.out_channels for layer in kept.modules() if isinstance(layer, nn.Conv2d)} <= {16, 32, 48, 64}
    assert [step["step"] for step in provenance_of(kept)] == ["prune", "distill"]
    monkeypatch.delattr("qface.compression.timed_network.compare")  # the run folder knows the time and the ratio
    (tmp_path / "fast.run" / "pruned.safetensors").unlink()  # as after a signal while it trained
    assert qface.compress(wide_network(), folder, tmp_path / "fast.onnx", limit, pruned) == found


def test_a_search_without_limits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give max_drop, max_mb or max_ms, or fixed bits"):
        qface.compress(network(), tmp_path / "nowhere", tmp_path / "small.onnx")


def test_a_drop_under_stress_is_limited_too(folder: Path, tmp_path: Path) -> None:
    config = replace(QUICK, weight_bits=6, activation_bits=6)
    target = CompressionTarget(max_drop=100.0, stress=("dark", "small"), at_fpr="1e-1")
    found = qface.compress(network(), folder, tmp_path / "small.onnx", target, config)
    (trial,) = found.trials
    assert found.chosen == trial and list(trial.stress) == ["dark", "small"]
    for condition, bound in trial.stress.items():
        assert bound == pytest.approx(100 * upper_bound(tmp_path / "small.onnx", folder, condition))
    assert "With changed probes it loses, with 95% confidence, at most: dark" in found.figures()[-1]
    assert f"{max(trial.stress.values()):.2f}" in str(found)


def upper_bound(file: Path, folder: Path, condition: str) -> float:
    faces = ImageFolder(folder, "second-half")
    changed = StressedImages(faces, condition)
    (probes, gallery), (reference, its_gallery) = (
        (embed(model, changed), embed(model, faces)) for model in (file, network())
    )
    drops = bootstrap_tpr_drop(
        reference, probes, faces.labels, ["1e-1"], gallery=gallery, reference_gallery=its_gallery
    )
    assert drops["1e-1"] is not None
    return drops["1e-1"].upper


def test_the_first_condition_that_is_missed_ends_a_trial(folder: Path, tmp_path: Path) -> None:
    stress = [word for name in STRESS_CONDITIONS for word in ("--stress", name)]
    arguments = ["compress", "tests.compression.test_compress:network", "--images", str(folder), *stress, "--json"]
    arguments += ["--at-fpr", "1e-1", "--distill", "never", "--num-images", "8"]
    arguments += ["--confidence", "0.6"]  # 36 images leave wide intervals, beside which conditions would not differ

    def trial_of(bits: int) -> dict[str, Any]:
        output = ["--bits", str(bits), "--max-drop", "100", "-o", str(tmp_path / f"w{bits}.onnx")]
        return dict(json.loads(CliRunner().invoke(main, [*arguments, *output]).stdout)["trials"][0])

    bits, bound = next(  # a student that loses more under some condition than it may lose without one
        (bits, trial["drop_bound"])
        for bits in (2, 3, 4)
        for trial in [trial_of(bits)]
        if max(trial["stress"].values()) > trial["drop_bound"] + 1e-6
    )
    limits = ["--bits", str(bits), "--max-drop", str(bound + 1e-6), "-o", str(tmp_path / "small.onnx")]
    result = CliRunner().invoke(main, [*arguments, *limits])
    assert result.exit_code == 1, result.output
    (trial,) = json.loads(result.stdout)["trials"]
    *met, (missed, largest) = trial["stress"].items()
    assert all(each <= bound + 1e-6 for _, each in met) and largest > bound + 1e-6
    assert trial["misses"] == [f"it loses up to {largest:.2f} percentage points under the condition {missed!r}"]


def test_impossible_stress_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stress\[1\] must be one of .*'dark'.*, got 'foggy'"):
        CompressionTarget(max_drop=1.0, stress=("dark", "foggy"))
    with pytest.raises(ConfigError, match="set max_drop"):
        CompressionTarget(max_mb=1.0, stress=("dark",))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["max_drop", "max_mb", "max_ms"])
def test_a_limit_that_is_no_positive_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a number > 0"):
        CompressionTarget(**{name: value})


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [1, 9, True, 6.0])
def test_bits_out_of_range_are_refused(name: str, bits: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        CompressConfig(**{name: bits})


@pytest.mark.parametrize(("distill", "name"), [("never", "w4a6"), ("if-needed", "w4a6-distilled")])
def test_fixed_bits_are_one_trial(folder: Path, tmp_path: Path, distill: DistillName, name: str) -> None:
    config = replace(QUICK, weight_bits=4, activation_bits=6, distill=distill)
    target = CompressionTarget(at_fpr="1e-1")
    found = qface.compress(network(), folder, tmp_path / "small.onnx", target, config)
    (trial,) = found.trials
    assert (trial.name, trial.weight_bits, trial.distilled) == (name, 4, distill != "never")
    assert found.chosen == trial
    steps = [step["step"] for step in provenance_of(qface.load(tmp_path / "small.run" / name / "student.safetensors"))]
    assert steps == ["quantize", "calibrate", *(["distill"] if trial.distilled else [])]
    record = RunRecord.read(tmp_path / "small.run")
    assert (record.sensitivity, record.log is None) == (None, distill == "never")
    made = (tmp_path / "small.run" / name / "student.onnx").stat().st_mtime_ns
    assert qface.compress(network(), folder, tmp_path / "small.onnx", target, config) == found
    assert (tmp_path / "small.run" / name / "student.onnx").stat().st_mtime_ns == made


def test_limits_decide_about_a_file_with_fixed_bits(folder: Path, tmp_path: Path) -> None:
    arguments = ["compress", "tests.compression.test_compress:network", "--images", str(folder), "--bits", "6"]
    arguments += ["--at-fpr", "1e-1", "--distill", "never", "--num-images", "8", "--json"]
    kept, missed = tmp_path / "kept.onnx", tmp_path / "missed.onnx"
    result = CliRunner().invoke(main, [*arguments, "--max-drop", "100", "-o", str(kept)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["chosen"]["name"] == "w6a6"
    result = CliRunner().invoke(main, [*arguments, "--max-mb", "0.001", "-o", str(missed)])
    assert result.exit_code == 1, result.output
    (trial,) = json.loads(result.stdout)["trials"]
    assert trial["misses"] == [f"{trial['mb']:.3f} MB"]
    assert kept.exists() and not missed.exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--bits", "5", "--activation-bits", "7"], "w5a7"),
        (["--bits", "5", "--weight-bits", "3"], "w3a5"),
        (["--weight-bits", "3"], "w3a8"),
    ],
    ids=" ".join,
)
def test_options_set_the_bits(folder: Path, tmp_path: Path, options: list[str], name: str) -> None:
    arguments = ["compress", "tests.compression.test_compress:network", "--images", str(folder), *options]
    arguments += ["--at-fpr", "1e-1", "--distill", "never", "--num-images", "8", "--json"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "small.onnx")])
    assert result.exit_code == 0, result.output
    assert [trial["name"] for trial in json.loads(result.stdout)["trials"]] == [name]
