from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torch import nn

import qface
from qface.data import ImageFolder
from qface.preprocessing import preprocessing_of
from tests.benchmarks.scripts import script
from tests.runtimes.runtime import HOST, Embeddings, Images, Runtime

CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class Case:
    """A student: weights in ``weights/`` or a network of pytorchcv, its bits, and the number of faces to embed."""

    network: str
    weight_bits: int
    activation_bits: int
    images: int

    def teacher(self, faces: Path) -> nn.Module:
        weights = faces / "weights" / f"{self.network}.safetensors"
        return qface.load(weights) if weights.exists() else script("foreign_networks").NETWORKS[self.network].build()


CASES = {
    "mobilefacenet-w6a6": Case("mobilefacenet_112x96", 6, 6, images=3),
    "mobilefacenet-w4a8": Case("mobilefacenet_112x96", 4, 8, images=2),
    "mobilefacenet-w8a8": Case("mobilefacenet_112x96", 8, 8, images=2),
    "iresnet18-w6a6": Case("iresnet18", 6, 6, images=1),
    "mobilenetv3-w8a8": Case("mobilenetv3_small_w1", 8, 8, images=2),
}


@dataclass(frozen=True)
class Exported:
    """A file, images that it reads, and their embeddings on the host."""

    file: Path
    images: Images
    embeddings: Embeddings


@pytest.fixture
def exported(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The file of one of CASES, made once for all processes of this run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def make(name: str) -> Exported:
        file, arrays = folder / f"{name}.onnx", folder / f"{name}.npz"
        with FileLock(folder / f"{name}.lock"):
            if not arrays.exists():
                images = write(CASES[name], faces, file)
                np.savez(arrays, images=images, embeddings=Runtime(HOST).embed(file, images))
        with np.load(arrays) as stored:
            return Exported(file, stored["images"], stored["embeddings"])

    return make


def write(case: Case, faces: Path, file: Path) -> Images:
    """Write the student of ``case``; return images of people on whom it is not calibrated."""
    tuning, judging = (ImageFolder(faces / "data" / "lfw", identities=half) for half in ("first-half", "second-half"))
    teacher = case.teacher(faces)
    bits = {"weight_bits": case.weight_bits, "activation_bits": case.activation_bits}
    config = qface.QuantizationConfig(**bits, weight_observer="minmax", activation_observer="minmax")
    student = qface.quantize(teacher, config)
    crops = tuning.read(range(CALIBRATION_IMAGES))
    qface.calibrate(student, crops, equalize=False, gptq=False, correct_biases=False)  # the arithmetic is the same
    qface.export(student, file, input="uint8")
    preprocessing = preprocessing_of(teacher)
    pixels = preprocessing.to_bytes(preprocessing(judging.read(range(case.images))))
    return np.ascontiguousarray(pixels.numpy())
