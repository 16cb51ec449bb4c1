"""Models of the paper's rows: each is made and evaluated once, and kept on disk with its figures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from harness.recipes import CALIBRATION_IMAGES, RECIPES
from harness.records import Record, Records, digest_of_file
from harness.stopwatch import timed
from safetensors.torch import load_file, save_file
from torch import nn

import qface
from paper import quantface
from paper.rows import Kind, Method
from paper.sources import Judge, Model, Sources
from qface.data import IndexedImages, Relabeled, nested_subset
from qface.data.content_digest import digest_of_images
from qface.files import replacing
from qface.models import MODEL_NAMES
from qface.pruning import cost_of

__all__ = ["Arms", "Unavailable"]

PRUNED_SHARE = 0.2
PAPER = qface.DistillConfig.paper()
FROM_SCRATCH = replace(PAPER, optimizer=replace(PAPER.optimizer, learning_rate=0.1))
"""Settings for a randomly initialized network; the learning rate is that of Tencent/TFace, recognition/tasks/ekd."""


class Unavailable(Exception):  # noqa: N818 - reports a missing input, not a failure
    """An input of a row is missing."""


@dataclass(frozen=True)
class Arm:
    """One model of a table.

    Args:
        network: the paper's name of the network.
        method: method that makes the model.
        images: training images, if any.
        settings: everything that the model depends on.
    """

    network: str
    method: Method
    images: IndexedImages | None
    settings: Record

    @property
    def name(self) -> str:
        """Name for use in file names."""
        return f"{self.network}-{self.method.name.replace(' ', '-').replace('%', 'pc')}"


@dataclass(frozen=True)
class Arms:
    """All models of one run of a table.

    Args:
        sources: networks and face images.
        records: store of models and figures.
        recipe: key of :data:`RECIPES`, for qface's own methods.
        teacher_of: teacher network by name of a distilled network.
        seed: seed of subsets, initial weights and training.
        max_steps: maximum steps of each training.
    """

    sources: Sources
    records: Records
    recipe: str
    teacher_of: dict[str, str]
    seed: int = 0
    max_steps: int | None = None

    def figures(self, network: str, method: Method) -> Record:
        """Return the figures of a model by column, and its ``mb``, ``images`` and ``seconds``.

        ``seconds`` is None if the training was interrupted.

        Args:
            network: the paper's name of the network.
            method: method that makes the model.

        Raises:
            Unavailable: the network, its images, or every evaluation set is missing.
        """
        weights, judges = self._weights(network), self.sources.judges(network)
        if not judges:
            raise Unavailable(f"no evaluation set for {network}")
        arm = self._arm(network, method, weights)
        figures = dict(self.records.recall(arm.name, arm.settings, lambda: self._make(arm)))
        shutil.rmtree(self._path(arm, ".training"), ignore_errors=True)
        for name, judge in judges.items():
            figures |= self._judged(arm, name, judge)
        return figures

    def _judged(self, arm: Arm, name: str, judge: Judge) -> Record:
        settings = arm.settings | {"judged on": judge.word}
        return self.records.recall(f"{arm.name}-{name}", settings, lambda: judge.measure(self._model(arm)))

    def _arm(self, network: str, method: Method, weights: Path) -> Arm:
        images = None if method.kind in ("float", "published") else self._images_of(network, method)
        if images is not None and images.labels is None:
            # Same training as the labeled row if no unlabeled folder exists: QuantFace's loss ignores labels.
            method = replace(method, labeled=False)
        settings = {
            "version": qface.__version__,
            "weights": digest_of_file(weights),
            "method": asdict(method),
            "recipe": self._recipe_settings(method) if method.kind in ("ours", "pruned") else None,
            "seed": self.seed,
            "max_steps": self.max_steps,
            "images": None if images is None else digest_of_images(images),
            "teacher": digest_of_file(self._weights(self.teacher_of[network])) if method.kind == "distilled" else None,
            "published": digest_of_file(self._published(network, method)) if method.kind == "published" else None,
        }
        return Arm(network, method, images, settings)

    def _weights(self, network: str) -> Path:
        weights = self.sources.network(network)
        if weights is None:
            raise Unavailable(f"no weights of {network}")
        return weights

    def _images_of(self, network: str, method: Method) -> IndexedImages:
        images = self.sources.training(network, method.labeled)
        if images is None:
            raise Unavailable(f"no training images for {network}")
        if method.kind == "quantface":
            images = Relabeled(images, None)
        return images if method.share == 1 else nested_subset(images, method.share, self.seed)

    def _published(self, network: str, method: Method) -> Path:
        assert method.bits is not None
        file = self.sources.published(network, method.bits)
        if file is None:
            raise Unavailable(f"no checkpoint of QuantFace for {network} w{method.bits}a{method.bits}")
        return file

    def _recipe_settings(self, method: Method) -> Record:
        recipe = RECIPES[self.recipe]
        return {
            "quantization": recipe.quantization.to_dict(),
            "calibration": asdict(recipe.calibration),
            "training": asdict(self._training(method)),
        }

    def _path(self, arm: Arm, ending: str) -> Path:
        return self.records.path(arm.name, arm.settings, ending)

    def _make(self, arm: Arm) -> Record:
        """Make and write the model; return its size and, if trained, images and seconds."""
        make: dict[Kind, Callable[[Arm], float]] = {
            "float": self._float,
            "ours": self._ours,
            "pruned": self._pruned,
            "quantface": self._quantface,
            "published": self._size_of_quantface,
            "distilled": self._distilled,
        }
        resumed = self._path(arm, ".training").exists()
        mb, seconds = timed(lambda: make[arm.method.kind](arm))
        facts: Record = {"mb": mb}
        if arm.images is not None:
            facts |= {"images": len(arm.images), "seconds": None if resumed else seconds}
        return facts

    def _model(self, arm: Arm) -> Model:
        """Return the model that :meth:`_make` wrote: an ONNX file, or a torch module for QuantFace's methods."""
        if arm.method.kind == "published":
            assert arm.method.bits is not None
            file, bits = self._published(arm.network, arm.method), arm.method.bits
            return quantface.load_published(file, self._teacher(arm.network), bits, bits)
        if arm.method.kind == "quantface":
            student = self._quantface_student(arm)
            student.load_state_dict(load_file(self._path(arm, ".safetensors")))
            return student
        return self._path(arm, ".onnx")

    def _teacher(self, network: str) -> nn.Module:
        return qface.load(self._weights(network))

    def _training(self, method: Method) -> qface.DistillConfig:
        """Return the recipe's training settings; without labels, the reference EKD has no genuine pairs."""
        config = RECIPES[self.recipe].training
        losses = replace(
            config.losses,
            class_head=method.class_head,
            reference_ekd=config.losses.reference_ekd and method.labeled,
        )
        return replace(config, losses=losses, seed=self.seed, max_steps=self.max_steps)

    def _distill(self, student: nn.Module, teacher: nn.Module, arm: Arm, config: qface.DistillConfig) -> None:
        assert arm.images is not None
        qface.distill(student, teacher, arm.images, config, run_dir=self._path(arm, ".training"), resume=True)

    def _float(self, arm: Arm) -> float:
        teacher = self._teacher(arm.network)
        qface.export(teacher, self._path(arm, ".onnx"))
        return cost_of(teacher).mb

    def _ours(self, arm: Arm) -> float:
        recipe, teacher, bits = RECIPES[self.recipe], self._teacher(arm.network), arm.method.bits
        assert bits is not None and arm.images is not None
        student = qface.quantize(teacher, replace(recipe.quantization, weight_bits=bits, activation_bits=bits))
        calibration = nested_subset(arm.images, min(CALIBRATION_IMAGES, len(arm.images)), self.seed)
        qface.calibrate(student, calibration, recipe.calibration)
        self._distill(student, teacher, arm, self._training(arm.method))
        return qface.export(student, self._path(arm, ".onnx")).stat().st_size / 1e6

    def _pruned(self, arm: Arm) -> float:
        teacher = self._teacher(arm.network)
        config = qface.PruningConfig(repair=RECIPES[self.recipe].repair)
        pruned = qface.prune(teacher, PRUNED_SHARE, arm.images, config)
        self._distill(pruned, teacher, arm, self._training(arm.method))
        qface.export(pruned, self._path(arm, ".onnx"))
        return cost_of(pruned).mb

    def _quantface(self, arm: Arm) -> float:
        student = self._quantface_student(arm)
        config = replace(quantface.TRAINING, seed=self.seed, max_steps=self.max_steps)
        self._distill(student, self._teacher(arm.network), arm, config)
        tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
        with replacing(self._path(arm, ".safetensors")) as temporary:
            save_file(tensors, temporary)
        return self._size_of_quantface(arm)

    def _quantface_student(self, arm: Arm) -> nn.Module:
        assert arm.method.bits is not None
        return quantface.student_of(self._teacher(arm.network), arm.method.bits, arm.method.bits)

    def _size_of_quantface(self, arm: Arm) -> float:
        """Return the size in MB by the paper's formula."""
        assert arm.method.bits is not None
        return cost_of(self._teacher(arm.network)).mb * arm.method.bits / 32

    def _distilled(self, arm: Arm) -> float:
        """Train a randomly initialized network with EKD."""
        teacher = self._teacher(self.teacher_of[arm.network])
        student = _fresh(arm.network, self._teacher(arm.network), self.seed)
        losses = replace(FROM_SCRATCH.losses, class_head=arm.method.class_head)
        config = replace(FROM_SCRATCH, losses=losses, seed=self.seed, max_steps=self.max_steps)
        self._distill(student, teacher, arm, config)
        qface.export(student, self._path(arm, ".onnx"))
        return cost_of(student).mb


def _fresh(network: str, trained: nn.Module, seed: int) -> nn.Module:
    """Return ``trained`` with initial weights, which depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _initialized(network, trained)


def _initialized(network: str, trained: nn.Module) -> nn.Module:
    name = network if network in MODEL_NAMES else f"iresnet{network.removeprefix('R')}"
    fresh = qface.load(name) if name in MODEL_NAMES else trained
    shapes = {key: value.shape for key, value in trained.state_dict().items()}
    if {key: value.shape for key, value in fresh.state_dict().items()} == shapes:
        return fresh
    for module in trained.modules():  # an architecture that qface does not know
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return trained
