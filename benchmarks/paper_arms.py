"""Makes the models that the paper's rows are of, and judges them; each once, on disk with its figures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import quantface
import torch
from accuracy_rows import CALIBRATION_IMAGES, RECIPES
from paper_rows import Method
from paper_sources import Model, Sources
from records import Record, Records, digest
from stopwatch import timed
from torch import nn

import qface
from qface.data import IndexedImages, nested_subset
from qface.models import MODEL_NAMES
from qface.pruning import cost_of

__all__ = ["Arms", "Unavailable"]

PRUNED_SHARE = 0.2


class Unavailable(Exception):  # noqa: N818 - it says what is missing, and is no failure
    """Something that a row needs is not there."""


@dataclass(frozen=True)
class Arms:
    """All models of one run of a table.

    Args:
        sources: networks and faces.
        records: where models and figures are kept.
        recipe: of :data:`RECIPES`, for what is ours.
        teacher_of: of a network that is distilled, the network it learns from.
        seed: of subsets, of weights of fresh networks, and of training.
        max_steps: of each training.
    """

    sources: Sources
    records: Records
    recipe: str
    teacher_of: dict[str, str]
    seed: int = 0
    max_steps: int | None = None

    def figures(self, network: str, method: Method) -> Record:
        """Figures by column, ``mb`` and ``images`` of a network treated in one way.

        Raises:
            Unavailable: the network, its images, or everything to judge it on is missing.
        """
        weights = self.sources.network(network)
        if weights is None:
            raise Unavailable(f"no weights of {network}")
        judges = self.sources.judges(network)
        if not judges:
            raise Unavailable(f"nothing to judge {network} on")
        name = f"{network}-{method.name.replace(' ', '-').replace('%', 'pc')}"
        settings = self._settings(network, method, weights)
        kept = {judge: self.records.find(f"{name}-{judge}", settings) for judge in judges}
        if any(found is None for found in kept.values()):
            model, facts = self._made(network, method, name, settings)
            for judge, measure in judges.items():
                kept[judge] = self.records.recall(f"{name}-{judge}", settings, lambda m=measure: {**facts, **m(model)})
            shutil.rmtree(self.records.path(name, settings, ".training"), ignore_errors=True)
        return {key: value for found in kept.values() if found for key, value in found.items()}

    def _settings(self, network: str, method: Method, weights: Path) -> Record:
        images = self.sources.training(network, method.labelled)
        return {
            "version": qface.__version__,
            "weights": digest(weights.read_bytes()),
            "method": asdict(method),
            "recipe": self._recipe_settings(method) if method.kind in ("ours", "pruned") else None,
            "seed": self.seed,
            "max_steps": self.max_steps,
            "images": None if images is None or method.kind == "float" else len(images),
            "teacher": self.teacher_of.get(network) if method.kind == "distilled" else None,
        }

    def _recipe_settings(self, method: Method) -> Record:
        recipe = RECIPES[self.recipe]
        return {
            "quantization": recipe.quantization.to_dict(),
            "calibration": recipe.calibration,
            "training": asdict(self._training(method)),
        }

    def _made(self, network: str, method: Method, name: str, settings: Record) -> tuple[Model, Record]:
        """The model, and what is known of it beside its figures."""
        if method.kind == "published":
            return self._published(network, method)
        teacher = self._teacher(network)
        if method.kind == "float":
            return teacher, {"mb": cost_of(teacher).mb, "images": 0, "seconds": 0.0}
        images = self._images(network, method)
        folder = self.records.path(name, settings, ".training")
        make: dict[str, Callable[[], tuple[Model, float]]] = {
            "ours": lambda: self._ours(teacher, method, images, folder, self.records.path(name, settings, ".onnx")),
            "pruned": lambda: self._pruned(teacher, images, folder),
            "quantface": lambda: self._quantface(teacher, method, images, folder),
            "distilled": lambda: self._distilled(network, method, images, folder),
        }
        (model, mb), seconds = timed(make[method.kind])
        return model, {"mb": mb, "images": len(images), "seconds": seconds}

    def _teacher(self, network: str) -> nn.Module:
        weights = self.sources.network(network)
        if weights is None:
            raise Unavailable(f"no weights of {network}")
        return qface.load(weights)

    def _images(self, network: str, method: Method) -> IndexedImages:
        images = self.sources.training(network, method.labelled)
        if images is None:
            raise Unavailable(f"no faces to tune {network} on")
        return images if method.share == 1 else nested_subset(images, method.share, self.seed)

    def _training(self, method: Method) -> qface.DistillConfig:
        """The settings of the recipe for ``method``; without labels EKD sees negative pairs only, or the teacher's."""
        recipe = RECIPES[self.recipe]
        config = recipe.after_pruning if method.kind == "pruned" else recipe.training
        return replace(
            config,
            class_head=method.class_head,
            ekd_parity=config.ekd_parity and method.labelled,
            seed=self.seed,
            max_steps=self.max_steps,
        )

    def _ours(
        self, teacher: nn.Module, method: Method, images: IndexedImages, folder: Path, file: Path
    ) -> tuple[Model, float]:
        recipe = RECIPES[self.recipe]
        assert method.bits is not None
        config = replace(recipe.quantization, weight_bits=method.bits, activation_bits=method.bits)
        calibration = nested_subset(images, min(CALIBRATION_IMAGES, len(images)), self.seed)
        student = qface.quantize(teacher, config)
        qface.calibrate(student, calibration, **recipe.calibration)
        qface.distill(student, teacher, images, self._training(method), run_dir=folder, resume=True)
        qface.export(student, file)
        return file, file.stat().st_size / 1e6

    def _pruned(self, teacher: nn.Module, images: IndexedImages, folder: Path) -> tuple[Model, float]:
        config = qface.PruningConfig(repair=RECIPES[self.recipe].repair)
        pruned = qface.prune(teacher, PRUNED_SHARE, images, config)
        qface.distill(pruned, teacher, images, self._training(Method("pruned")), run_dir=folder, resume=True)
        return pruned, cost_of(pruned).mb

    def _quantface(
        self, teacher: nn.Module, method: Method, images: IndexedImages, folder: Path
    ) -> tuple[Model, float]:
        assert method.bits is not None
        student = quantface.student_of(teacher, method.bits, method.bits)
        config = replace(quantface.TRAINING, seed=self.seed, max_steps=self.max_steps)
        qface.distill(student, teacher, images, config, run_dir=folder, resume=True)
        return student, cost_of(teacher).mb * method.bits / 32

    def _published(self, network: str, method: Method) -> tuple[Model, Record]:
        assert method.bits is not None
        file = self.sources.published(network, method.bits)
        if file is None:
            raise Unavailable(f"no checkpoint of QuantFace for {network} w{method.bits}a{method.bits}")
        model: Any = self._teacher(network)
        student = quantface.load_published(file, model, method.bits, method.bits)
        return student, {"mb": cost_of(model).mb * method.bits / 32, "images": 0, "seconds": 0.0}

    def _distilled(self, network: str, method: Method, images: IndexedImages, folder: Path) -> tuple[Model, float]:
        """A fresh network of the same kind, which EKD's authors' settings teach."""
        teacher = self._teacher(self.teacher_of[network])
        student = _fresh(network, self._teacher(network), self.seed)
        config = replace(
            qface.DistillConfig.paper(), class_head=method.class_head, seed=self.seed, max_steps=self.max_steps
        )
        qface.distill(student, teacher, images, config, run_dir=folder, resume=True)
        return student, cost_of(student).mb


def _fresh(network: str, trained: nn.Module, seed: int) -> nn.Module:
    """``trained`` with weights as before any training, the same for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _initialised(network, trained)


def _initialised(network: str, trained: nn.Module) -> nn.Module:
    name = network if network in MODEL_NAMES else f"iresnet{network.removeprefix('R')}"
    fresh = qface.load(name) if name in MODEL_NAMES else trained
    shapes = {key: value.shape for key, value in trained.state_dict().items()}
    if {key: value.shape for key, value in fresh.state_dict().items()} == shapes:
        return fresh
    for module in trained.modules():  # a network of its own
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return trained
