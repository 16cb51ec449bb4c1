"""What only shows in processes of their own: a run that is killed, and two ranks that share a batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qface.distillation import distill
from qface.errors import ConfigError, DependencyError
from qface.parallel import processes_for

from .networks import changed, face_images, residual_network, same_weights, student_of
from .worker import CONFIG, WITH_FEATURES, networks

TESTS = Path(__file__).parent.parent


def run(*command: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    # As many threads as here: they decide in which order float32 sums are rounded.
    killed = run("-m", "distillation.worker", "killed", str(tmp_path / "killed"), threads=torch.get_num_threads())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    log = tmp_path / "killed" / "log.jsonl"
    assert len(log.read_text().splitlines()) > 2

    straight, resumed = networks()[0], networks()[0]
    distill(straight, networks()[1], face_images(), CONFIG, tmp_path / "straight", progress=False)
    distill(resumed, networks()[1], face_images(), CONFIG, tmp_path / "killed", resume=True, progress=False)
    assert same_weights(straight, resumed)
    assert log.read_text() == (tmp_path / "straight" / "log.jsonl").read_text()


def test_two_ranks_make_the_weights_of_one(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    both = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "distillation.worker", "two ranks", str(tmp_path)),
    )
    assert both.returncode == 0, both.stderr
    one, teacher = networks(torch.float64)
    before = [parameter.detach().clone() for parameter in one.parameters()]
    distill(one, teacher, face_images(dtype=torch.float64), CONFIG, progress=False)
    assert not any(torch.equal(old, new) for old, new in zip(before, one.parameters(), strict=True))
    for rank in (0, 1):
        other = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(other, one.state_dict(), rtol=1e-12, atol=1e-13)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.testing.assert_close(saved["state"]["student"], one.state_dict(), rtol=1e-12, atol=1e-13)


def test_features_are_shared_too(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    both = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "distillation.worker", "features", str(tmp_path)),
    )
    assert both.returncode == 0, both.stderr
    one = distill(student_of(residual_network()), residual_network(), face_images(), WITH_FEATURES, progress=False)
    without = changed(WITH_FEATURES, losses={"feature_loss_weight": 0.0})
    other = distill(student_of(residual_network()), residual_network(), face_images(), without, progress=False)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, value in one.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(one.stem.weight, other.stem.weight, rtol=1e-3, atol=1e-5)


def test_several_processes_need_lightning_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(DependencyError, match=r"pip install 'qface\[distributed\]'"):
        processes_for("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        processes_for(device)
