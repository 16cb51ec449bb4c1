"""Run by the tests in processes of their own: distills a tiny network and saves it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qface.data.images import IndexedImages
from qface.distillation import distill
from qface.signals import ended_by_signals

from .networks import CPU, changed, face_images, residual_network, student_of, tiny_network

CONFIG = changed(CPU, losses={"class_head": True})
WITH_FEATURES = changed(CPU, losses={"feature_loss_weight": 1.0}, max_steps=2)
WITH_WORKERS = changed(CPU, batch_size=8, max_steps=4, checkpoint_every=50, num_workers=2)


class KilledWhileReading(IndexedImages):
    """Ends the process, as ``kill -9`` would, at one of its reads."""

    def __init__(self, images: IndexedImages, last: int) -> None:
        self.images = images
        self.labels = images.labels
        self.left = last

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images.read(indices)

    def content(self, index: int) -> bytes:
        return self.images.content(index)


def networks(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny_network(0).to(dtype), tiny_network(1).to(dtype)


def signaled(number: int, folder: Path) -> None:
    """Train on ``crops`` until the second step sends a signal to all processes of the group."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a parent may ignore them
    student, teacher = networks()
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += student.training
        if steps == 2:
            subprocess.run(["sh", "-c", f"kill -{number} 0"], check=False)  # workers know signals of this process

    student.register_forward_hook(count)
    with ended_by_signals():
        distill(student, teacher, folder / "crops", WITH_WORKERS, folder / "run", progress=False)


def main(task: str, folder: Path) -> None:
    if task.startswith("signaled"):
        signaled(int(task.split()[1]), folder)
        return
    if task == "killed":
        distill(*networks(), KilledWhileReading(face_images(), last=5), CONFIG, folder, progress=False)
        return
    if task == "features":
        student = distill(
            student_of(residual_network()), residual_network(), face_images(), WITH_FEATURES, progress=False
        )
    else:
        student = distill(*networks(torch.float64), face_images(dtype=torch.float64), CONFIG, folder, progress=False)
    torch.save(student.state_dict(), folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
