"""Fixtures that tests of files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

import qface


@pytest.fixture(scope="session")
def mobilefacenet_file(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MobileFaceNet at w6a6, calibrated on 32 faces once for all processes of the run, and saved."""
    worker = tmp_path_factory.getbasetemp()
    folder = worker.parent if "PYTEST_XDIST_WORKER" in os.environ else worker
    path = folder / "mobilefacenet_w6a6.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            student = qface.quantize(qface.load(faces / "weights" / "mobilefacenet_112x96.safetensors"), 6)
            qface.calibrate(student, faces / "data" / "lfw", qface.CalibrationConfig(num_images=32), "first-half")
            qface.save(student, path)
    return path
