"""Judging of files: the TPR that a file loses against the float network, on people that nothing was tuned on."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qface.compression.compress_config import CompressionTarget
from qface.data.folders import ImageFolder
from qface.data.images import labels_of
from qface.deployment.latency import compare, open_file
from qface.errors import ConfigError, ImagesError
from qface.evaluation.bootstrap import TprDrop, bootstrap_tpr_drop
from qface.evaluation.embedding import as_embedder, embed
from qface.evaluation.shared_embedding import embed_shared
from qface.evaluation.verification import count_pairs, finest_rate, impostors_needed, ranks_of, tpr_at_fpr
from qface.parallel import processes_for

__all__ = ["Judge", "milliseconds_of"]


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
        tpr = tpr_at_fpr(self._reference, labels, [target.at_fpr])[target.at_fpr].tpr
        assert tpr is not None  # the rate was checked
        self.tpr = tpr

    def __call__(self, file: Path) -> TprDrop:
        """The TPR that the ONNX file at ``file`` loses.

        Raises:
            CheckpointError: it cannot be read.
            QFaceError: its embeddings are not finite.
        """
        probes, rate = embed(file, self.faces), self._target.at_fpr
        drop = bootstrap_tpr_drop(self._reference, probes, self._labels, [rate], confidence=self._target.confidence)[
            rate
        ]
        assert drop is not None  # the rate was checked
        return drop


def _check_rate(fpr: str, impostors: int) -> None:
    if ranks_of([fpr], impostors)[fpr] is not None:
        return
    advice = finest_rate(impostors)
    raise ConfigError(
        f"FPR {fpr} needs {impostors_needed(fpr):,} impostor pairs, and the people to judge on have {impostors:,}: "
        + ("give more people" if advice is None else f"give more people, or judge at {advice}")
    )


def milliseconds_of(file: Path) -> float:
    """Median time of one image on one thread in onnxruntime."""
    (row,) = compare([open_file(file)])
    return row.median
