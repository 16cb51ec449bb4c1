"""Judging of files: the TPR that a file loses against the float network, on people that nothing was tuned on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qface.compression.compress_config import CompressionTarget
from qface.data.folders import ImageFolder
from qface.data.images import labels_of
from qface.deployment.latency import compare, open_file
from qface.errors import ConfigError, ImagesError
from qface.evaluation.bootstrap import TprDrop, bootstrap_tpr_drop
from qface.evaluation.embedding import Embeddings, as_embedder, embed
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.verification import count_pairs, ranks_of, tpr_at_fpr
from qface.parallel import processes_for

__all__ = ["Judge", "Verdict", "milliseconds_of"]


@dataclass(frozen=True)
class Verdict:
    """A file beside the float network.

    Args:
        tpr: of the file, 0..1.
        drop: what it loses.
    """

    tpr: float
    drop: TprDrop


class Judge:
    """Compares files with ``teacher`` on ``faces``, the people that trials are judged on.

    Args:
        teacher: the float network.
        faces: a folder with labels.
        target: whose rate and confidence count.
        folder: where the teacher's embeddings are kept, so that a stopped run goes on.

    Attributes:
        faces: those.
        tpr: of the float network, 0..1.

    Raises:
        ConfigError: the people have too few impostor pairs for the rate.
        ImagesError: images carry no labels, cannot be read, or have no genuine or no impostor pairs.
    """

    def __init__(self, teacher: nn.Module, faces: ImageFolder, target: CompressionTarget, folder: Path) -> None:
        labels = labels_of(faces)
        if labels is None:
            raise ImagesError(f"{faces.root} does not say who is who: give a folder with one subfolder a person")
        _check_rate(target.at_fpr, count_pairs(labels)[1])
        self.faces, self._labels, self._target = faces, labels, target
        self._reference = embed_shared(as_embedder(teacher), faces, processes_for(None), folder)
        self.tpr = self._tpr(self._reference)

    def __call__(self, file: Path) -> Verdict:
        """The verdict on the ONNX file at ``file``.

        Raises:
            CheckpointError: it cannot be read.
            QFaceError: its embeddings are not finite.
        """
        probes = embed(file, self.faces)
        rate = self._target.at_fpr
        drop = bootstrap_tpr_drop(self._reference, probes, self._labels, [rate], confidence=self._target.confidence)[
            rate
        ]
        assert drop is not None  # the rate was checked
        return Verdict(self._tpr(probes), drop)

    def _tpr(self, embeddings: Embeddings) -> float:
        tpr = tpr_at_fpr(embeddings, self._labels, [self._target.at_fpr])[self._target.at_fpr].tpr
        assert tpr is not None
        return tpr


def _check_rate(fpr: str, impostors: int) -> None:
    if ranks_of([fpr], impostors)[fpr] is not None:
        return
    advice = next((rate for rate in ("1e-4", "1e-3", "1e-2", "1e-1") if ranks_of([rate], impostors)[rate]), None)
    raise ConfigError(
        f"FPR {fpr} needs {10 / float(fpr):,.0f} impostor pairs, and the people to judge on have {impostors:,}: "
        + ("give more people" if advice is None else f"give more people, or judge at {advice}")
    )


def milliseconds_of(file: Path) -> float:
    """Median time of one image on one thread in onnxruntime."""
    (row,) = compare([open_file(file)])
    return row.median
