"""Inputs of the tables: networks in --weights, face images in --data, and where to get missing ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.held_out import Embeddings, Halves
from harness.records import digest, digest_of_file

import qface
from qface.data import ImageFolder, IndexedImages, Relabeled
from qface.evaluation import embed

__all__ = ["HALF_COLUMNS", "STAND_INS", "Figures", "Judge", "Model", "Sources"]

Model = Any  # anything that qface.evaluate accepts
Figures = dict[str, float | None]

STAND_INS = {"mobilefacenet": "mobilefacenet_112x96", "iresnet18": "iresnet18"}
"""Stand-in networks, evaluated on the second half of LFW, and their file names."""
HALF_COLUMNS = {"lfw": "LFW, second half", "1e-5": "TPR at 1e-5, second half", "1e-4": "TPR at 1e-4, second half"}

_ENDINGS = (".safetensors", ".pth", ".pt", ".onnx")
_MODEL_ZOO = "InsightFace's model zoo, recognition/arcface_torch: glint360k_cosface_{}_fp16_0.1, backbone.pth"
_SETS = {"lfw": "lfw.bin", "calfw": "calfw.bin", "cplfw": "cplfw.bin"}


@dataclass(frozen=True)
class Judge:
    """An evaluation set.

    Args:
        word: digest of the set.
        measure: function from a model to its figures in percent, by column.
    """

    word: str
    measure: Callable[[Model], Figures]


@dataclass(frozen=True)
class Sources:
    """The folders of networks and of face images.

    Args:
        weights: ``R18.pth``, ``R34.pth``, ``R50.pth``, ``R100.pth`` (or .safetensors, .pt, .onnx); the stand-ins;
            ``quantface/R18_w6a6.pth`` and so on, as QuantFace publishes them.
        data: ``lfw/`` with ``lfw_pairs.txt``, ``lfw.bin``, ``calfw.bin``, ``cplfw.bin``, ``sllfw_pairs.txt``,
            ``IJBC/``; ``unlabeled/``, face images without labels.
    """

    weights: Path
    data: Path

    def network(self, name: str) -> Path | None:
        """Return the file of a network, if present."""
        return self._file(self.weights / STAND_INS.get(name, name))

    def published(self, name: str, bits: int) -> Path | None:
        """Return the published QuantFace file of a network, if present."""
        return self._file(self.weights / "quantface" / f"{name}_w{bits}a{bits}")

    @staticmethod
    def _file(stem: Path) -> Path | None:
        candidates = (stem.with_name(stem.name + ending) for ending in _ENDINGS)
        return next((path for path in candidates if path.exists()), None)

    @cached_property
    def halves(self) -> Halves | None:
        """LFW in two halves, for the stand-ins; None if missing."""
        there = (self.data / "lfw").is_dir() and (self.data / "lfw_pairs.txt").exists()
        return Halves(self.data) if there else None

    @cached_property
    def _lfw(self) -> ImageFolder:
        """All of LFW, scanned only once."""
        return ImageFolder(self.data / "lfw")

    def training(self, network: str, labeled: bool) -> IndexedImages | None:
        """Return training images: all of LFW, or the first half of its identities for stand-ins."""
        if not (self.data / "lfw").is_dir():
            return None
        if network in STAND_INS:
            images: IndexedImages | None = self.halves.tuning if self.halves else None
        else:
            images = self._lfw
        if labeled or images is None:
            return images
        unlabeled = self.data / "unlabeled"
        return Relabeled(ImageFolder(unlabeled) if unlabeled.is_dir() else images, None)

    def judges(self, network: str) -> dict[str, Judge]:
        """Return the evaluation sets of a network, by name."""
        if network in STAND_INS:
            return {"halves": Judge(digest(self.halves.names()), self._on_halves)} if self.halves else {}
        found = {
            name: Judge(digest_of_file(self.data / file), self._on_pairs(name, self.data / file))
            for name, file in _SETS.items()
            if (self.data / file).exists()
        }
        pairs = self.data / "sllfw_pairs.txt"
        if pairs.exists() and (self.data / "lfw").is_dir():
            found["sllfw"] = Judge(digest_of_file(pairs), self._on_pairs("sllfw", self.data / "lfw", pairs))
        if (self.data / "IJBC").is_dir():
            found["ijbc"] = Judge(_digest_of_meta(self.data / "IJBC"), self._on_ijbc)
        return found

    def _on_halves(self, model: Model) -> Figures:
        assert self.halves is not None
        embeddings: Embeddings = embed(model, self.halves.held_out, progress=True)
        figures = self.halves.figures(embeddings, embeddings)
        return {
            HALF_COLUMNS["lfw"]: 100 * figures["accuracy"],
            **{HALF_COLUMNS[fpr]: _percent(figures["tpr"][fpr]) for fpr in ("1e-5", "1e-4")},
        }

    def _on_pairs(self, column: str, images: Path, pairs: Path | None = None) -> Callable[[Model], Figures]:
        return lambda model: {column: _percent(qface.evaluate(model, images, pairs, progress=True).accuracy)}

    def _on_ijbc(self, model: Model) -> Figures:
        rates = qface.evaluate_templates(model, self.data / "IJBC", "paper", progress=True).tpr_at_fpr
        return {f"ijbc-{fpr}": _percent(rates[fpr]) for fpr in ("1e-5", "1e-4")}

    def missing(self, networks: list[str]) -> list[str]:
        """Return a line for each missing file, with where to get it."""
        lacks = [
            f"no weights of {name}: {_MODEL_ZOO.format(name.lower())}, as {self.weights / name}.pth"
            for name in networks
            if name not in STAND_INS and self.network(name) is None
        ]
        wanted = {
            **dict.fromkeys(_SETS.values(), "InsightFace's dataset zoo (faces_webface_112x112 or faces_emore)"),
            "sllfw_pairs.txt": "whdeng.cn/SLLFW, pair_SLLFW.txt; with lfw/ beside it",
            "lfw": "vis-www.cs.umass.edu/lfw, its photos cut by qface align",
            "IJBC": "NIST (IJB-C, by request), with InsightFace's meta/ and loose_crop/",
        }
        return lacks + [
            f"no {self.data / file}: {place}" for file, place in wanted.items() if not (self.data / file).exists()
        ]


def _digest_of_meta(folder: Path) -> str:
    """Return a digest of IJB-C's list files by size, since reading them takes long."""
    return digest("\n".join(f"{path.name} {path.stat().st_size}" for path in sorted((folder / "meta").iterdir())))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
