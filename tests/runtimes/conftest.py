from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torch import Tensor, nn

import qface
from qface.data import ImageFolder
from qface.graph.capture import capture
from qface.preprocessing import preprocessing_of
from tests.benchmarks.scripts import script
from tests.runtimes.runtime import HOST, Embeddings, Images, Runtime

CALIBRATION_IMAGES = 8
# Equalization gives channels different zero points.
EQUALIZED = qface.CalibrationConfig(gptq=False, correct_biases=False)


@dataclass(frozen=True)
class Case:
    """A student: weights in ``weights/`` or a network of pytorchcv, its bits, and the number of faces to embed."""

    network: str
    weight_bits: int
    activation_bits: int
    images: int


CASES = {
    "mobilefacenet-w6a6": Case("mobilefacenet_112x96", 6, 6, images=3),
    "mobilefacenet-w4a8": Case("mobilefacenet_112x96", 4, 8, images=2),
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
    teacher = captured(case.network, faces)
    bits = {"weight_bits": case.weight_bits, "activation_bits": case.activation_bits}
    config = qface.QuantizationConfig(**bits, weight_observer="minmax", activation_observer="minmax")
    student = qface.quantize(teacher, config)
    tuning, held_out = read_crops(faces)
    qface.calibrate(student, tuning, EQUALIZED)
    qface.export(student, file, input="uint8")
    preprocessing = preprocessing_of(teacher)
    pixels = preprocessing.to_bytes(preprocessing(held_out[: case.images]))
    return np.ascontiguousarray(pixels.numpy())


@cache
def captured(network: str, faces: Path) -> nn.Module:
    """The layers of a network, found once for all its bits."""
    weights = faces / "weights" / f"{network}.safetensors"
    return capture(qface.load(weights) if weights.exists() else script("foreign_networks").NETWORKS[network].build())


@cache
def read_crops(faces: Path) -> tuple[Tensor, Tensor]:
    """Images to calibrate on, and as many as any case embeds of other people."""
    halves = (ImageFolder(faces / "data" / "lfw", identities=half) for half in ("first-half", "second-half"))
    numbers = (CALIBRATION_IMAGES, max(case.images for case in CASES.values()))
    tuning, held_out = (half.read(range(number)) for half, number in zip(halves, numbers, strict=True))
    return tuning, held_out
