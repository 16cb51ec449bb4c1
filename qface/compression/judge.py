"""Evaluation of trials: the TPR that a file loses against the float network, on people who were not tuned on."""

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
    """Compare ONNX files with the float network on one set of people.

    Args:
        teacher: the float network.
        faces: folder with one subfolder per person.
        target: its ``at_fpr`` and ``confidence`` are used.
        folder: cache of the teacher's embeddings, for runs that continue.

    Attributes:
        faces: the folder.
        tpr: TPR of the float network, 0..1.

    Raises:
        ConfigError: the people have too few impostor pairs for the FPR.
        ImagesError: the images have no labels, cannot be read, or have no genuine or no impostor pairs.
    """

    def __init__(self, teacher: nn.Module, faces: ImageFolder, target: CompressionTarget, folder: Path) -> None:
        labels = labels_of(faces)
        if labels is None:
            raise ImagesError(f"{faces.root} does not say who is who: give a folder with one subfolder per person")
        _check_rate(target.at_fpr, count_pairs(labels)[1])
        self.faces, self._labels, self._target = faces, labels, target
        self._reference = embed_shared(as_embedder(teacher), faces, processes_for(None), folder)
        tpr = tpr_at_fpr(self._reference, labels, [target.at_fpr])[target.at_fpr].tpr
        assert tpr is not None  # the rate was checked
        self.tpr = tpr

    def __call__(self, file: Path) -> TprDrop:
        """Return the TPR that an ONNX file loses, with its confidence interval.

        Args:
            file: the file.

        Raises:
            CheckpointError: the file cannot be read.
            QFaceError: an embedding is not finite.
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
        f"FPR {fpr} needs {impostors_needed(fpr):,} impostor pairs, and the people to evaluate on have {impostors:,}: "
        + ("give more people" if advice is None else f"give more people, or use the FPR {advice} (at_fpr, --at-fpr)")
    )


def milliseconds_of(file: Path) -> float:
    """Return the median time per image on one thread in onnxruntime, in ms.

    Args:
        file: the ONNX file.
    """
    (row,) = compare([open_file(file)])
    return row.median
