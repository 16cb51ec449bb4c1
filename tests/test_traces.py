"""Verbs change nothing in the process that calls them."""

from __future__ import annotations

import copy
import logging
import random
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qface
from qface.evaluation import as_embedder
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.conftest import Crops
from tests.data.ijb import SmallIjb
from tests.networks import random_faces, tiny_face_net

Verb = Callable[[Path], object]


def global_state() -> dict[str, Any]:
    loggers = [logging.root, *map(logging.getLogger, ("qface", "torch.onnx", "torch"))]
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "warnings": list(warnings.filters),
        "loggers": [(logger.level, logger.disabled, list(logger.handlers)) for logger in loggers],
        "disabled": logging.root.manager.disable,
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def network() -> nn.Module:
    return with_preprocessing(tiny_face_net(), Preprocessing(source="user"))


def new_student() -> Any:
    return qface.calibrate(qface.quantize(network()), random_faces(16))


def student() -> Any:
    """A copy of one that is made once."""
    return copy.deepcopy(_student())


_student = cache(new_student)


def distill(_: Path) -> nn.Module:
    config = qface.DistillConfig(batch_size=8, max_steps=2, device="cpu")
    return qface.distill(student(), network(), random_faces(16), config, progress=False)


VERBS: dict[str, Verb] = {
    "load a name": lambda folder: qface.load("mobilefacenet"),
    "load a network of qface": lambda folder: qface.load(folder / "network.safetensors"),
    "load a checkpoint": lambda folder: qface.load(folder / "checkpoint.pt"),
    "load onnx": lambda folder: qface.load(folder / "network.onnx"),
    "save": lambda folder: qface.save(student(), folder / "new.safetensors"),
    "inspect": lambda folder: qface.inspect(network()),
    "quantize and calibrate": lambda folder: new_student(),
    "sensitivity": lambda folder: qface.sensitivity(network(), random_faces(16)),
    "allocate_bits": lambda folder: qface.allocate_bits(network(), random_faces(16), 0.1),
    "measure_size": lambda folder: qface.measure_size(network(), 6),
    "export a student": lambda folder: qface.export(student(), folder / "new.onnx"),
    "export a network": lambda folder: qface.export(network(), folder / "new.onnx"),
    "verify": lambda folder: qface.verify(student(), folder / "student.onnx", random_faces()),
    "selftest": lambda folder: qface.selftest(folder / "student.onnx"),
    "evaluate": lambda folder: qface.evaluate(network(), folder / "crops"),
    "evaluate_templates": lambda folder: qface.evaluate_templates(network(), folder / "ijb"),
    "operating_thresholds": lambda folder: qface.operating_thresholds(student(), network(), folder / "crops", "0.1"),
    "match_thresholds": lambda folder: qface.match_thresholds(folder / "student.onnx", folder / "crops", ("0.1",)),
    "prune": lambda folder: qface.prune(network(), 0.2, random_faces(16)),
    "distill": distill,
}


@pytest.fixture
def files(tmp_path: Path, crops: Crops) -> Path:
    crops(dict.fromkeys(("Ann", "Bob", "Cem", "Dot", "Eve"), 5))
    SmallIjb(tmp_path / "ijb")
    qface.save(network(), tmp_path / "network.safetensors")
    torch.save(qface.load("mobilefacenet").state_dict(), tmp_path / "checkpoint.pt")
    qface.export(network(), tmp_path / "network.onnx")
    qface.export(student(), tmp_path / "student.onnx")
    return tmp_path


def test_no_verb_leaves_a_trace_in_the_process(files: Path) -> None:
    traces = {}
    for name, verb in VERBS.items():
        before = global_state()
        verb(files)
        after = global_state()
        traces[name] = [part for part, state in after.items() if state != before[part]]
    assert {name: parts for name, parts in traces.items() if parts} == {}


class Waiting(nn.Module):
    """Each of its forward passes stops until it is told to go on; ``modes`` are those after that."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.here = {name: threading.Event() for name in ("first", "second")}
        self.go_on = {name: threading.Event() for name in ("first", "second")}
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        name = threading.current_thread().name
        if name in self.here:
            self.here[name].set()
            assert self.go_on[name].wait(60)
        self.modes.append(self.norm.training)
        return self.norm(images).flatten(1)


def test_threads_that_evaluate_one_model_leave_each_other_its_mode() -> None:
    model = with_preprocessing(Waiting().train(), Preprocessing(size=(4, 4)))
    statistics = copy.deepcopy(model.norm.state_dict())
    embedder = as_embedder(model)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    embedder(images)  # the first call also measures memory formats, in passes of its own
    model.modes.clear()
    threads = {name: threading.Thread(target=embedder, args=(images,), name=name) for name in model.here}
    for name, thread in threads.items():
        thread.start()
        assert model.here[name].wait(60)
    for name, thread in threads.items():
        model.go_on[name].set()
        thread.join()
    assert model.modes == [False, False]
    assert model.training and model.norm.training
    assert all(torch.equal(value, statistics[name]) for name, value in model.norm.state_dict().items())
