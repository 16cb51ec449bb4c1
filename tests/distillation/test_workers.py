"""DataLoader workers: they change no value, hand over errors, and leave signals to the training process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qface.data import ImageFolder
from qface.data.augmentation import AugmentationConfig
from qface.data.images import IndexedImages, TensorImages
from qface.data.relabeled import Relabeled
from qface.distillation import distill
from qface.distillation.batches import Batch, batches_of
from qface.errors import ImagesError
from qface.parallel import SingleProcess
from tests.crops import write_crops
from tests.networks import random_faces

from .networks import CPU, changed, log, same_weights, tiny_network
from .worker import WITH_WORKERS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")
TESTS = Path(__file__).parent.parent
STEPS = range(3, 7)


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    write_crops(tmp_path / "crops", dict.fromkeys(("Ann", "Bob", "Cid"), 8))
    return tmp_path / "crops"


def stream(source: IndexedImages, **fields: Any) -> Any:
    config = changed(CPU, batch_size=8, **fields)
    return batches_of(source, config, SingleProcess(torch.device("cpu"))).stream(STEPS)


def workers_of(source: IndexedImages, **fields: Any) -> int:
    """Number of processes that read for the first batch."""
    batches = stream(source, **fields)
    next(batches)
    return len(multiprocessing.active_children())


@pytest.mark.parametrize("augmentation", [None, AugmentationConfig(mixture=0.5)])
def test_workers_change_no_value(augmentation: AugmentationConfig | None, crops: Path) -> None:
    def batches(num_workers: int) -> list[Batch]:
        return list(stream(ImageFolder(crops), augmentation=augmentation, num_workers=num_workers))

    alone, others = batches(0), batches(2)
    assert len(alone) == len(STEPS)
    for one, other in zip(alone, others, strict=True):
        assert one.labels is not None and other.labels is not None
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_workers_take_the_cores_that_torch_leaves(crops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def workers(cores: int, **fields: Any) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        return workers_of(ImageFolder(crops), **{"num_workers": None} | fields)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [workers(cores) for cores in (1, 2, 3, 64)] == [0, 0, 1, 4]
    assert workers(1, num_workers=1) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [workers(cores) for cores in (4, 6)] == [0, 1]


def test_images_in_memory_need_no_workers() -> None:
    faces = TensorImages(random_faces(24))
    assert workers_of(faces, num_workers=2) == 0
    assert workers_of(Relabeled(faces, torch.arange(24)), num_workers=2) == 0


def test_an_error_in_a_worker_is_one_line(crops: Path) -> None:
    folder = ImageFolder(crops)
    for path in folder.paths:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImagesError, match="cannot be read as images") as caught:
        next(stream(folder, num_workers=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_the_step(number: signal.Signals, crops: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "distillation.worker", f"signaled {number.value}", str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = f"{TESTS}{os.pathsep}{TESTS.parent}"
    stopped = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert stopped.returncode == 128 + number, stopped.stderr
    assert [record["step"] for record in log(tmp_path / "run")] == [0, 1]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 2
    straight, resumed = tiny_network(0), tiny_network(0)
    distill(straight, tiny_network(1), crops, WITH_WORKERS)
    distill(resumed, tiny_network(1), crops, WITH_WORKERS, tmp_path / "run", resume=True)
    assert same_weights(straight, resumed)
