"""Thresholds in the metadata of an ONNX file, so that a device knows when two faces match."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qface.data.images import Images, labels_of
from qface.data.sources import as_image_source
from qface.deployment.metadata import add_metadata, read_metadata
from qface.errors import CheckpointError, ImagesError, one_line
from qface.evaluation.embedding import Model, embed
from qface.evaluation.verification import count_pairs, ranks_of, tpr_at_fpr, unmeasured
from qface.limits import parse_json
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["DEVICE_FPRS", "MatchThresholds", "match_thresholds", "thresholds_of", "write_thresholds"]

DEVICE_FPRS = ("1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
"""False-positive rates that devices choose from, as exact decimals."""

_KEY = "thresholds"  # the metadata's


@dataclass(frozen=True, repr=False)
class MatchThresholds(Result):
    """Cosines above which two faces match, where one model embeds both, and what they were measured on.

    Args:
        by_fpr: the threshold by false-positive rate, a decimal such as ``"1e-4"``.
        images: how many images they were measured on.
        identities: of how many people.
        impostor_pairs: pairs of images of two people, of which the rate is the share that is accepted.
        people: which people, as they were named; None for all.

    Example:
        >>> MatchThresholds({"1e-3": 0.25}, 20, 10, 190).by_fpr["1e-3"]
        0.25
    """

    by_fpr: dict[str, float]
    images: int
    identities: int
    impostor_pairs: int
    people: str | None = None

    def _key_figures(self) -> Mapping[str, object]:
        return {"by_fpr": self.by_fpr, "images": self.images, "identities": self.identities}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for file metadata."""
        return asdict(self)

    def __str__(self) -> str:
        """The thresholds in one line."""
        rates = ", ".join(f"{threshold:.4f} (FPR {fpr})" for fpr, threshold in self.by_fpr.items())
        measured = f"{self.images:,} images of {self.identities:,} people, {self.impostor_pairs:,} impostor pairs"
        return f"two faces match above a cosine of {rates}; measured on {measured}"


@shows_progress
def match_thresholds(
    model: Model,
    images: Images,
    fprs: Sequence[str] = DEVICE_FPRS,
    identities: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> MatchThresholds:
    """Measure the cosine above which two faces match, where ``model`` embeds both, at several false-positive rates.

    Does not change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder a person, or other labeled images.
        fprs: rates as decimals between 0 and 1; those with fewer than ten accepted impostors are left out.
        identities: of a folder, which people.
        batch_size: images a forward pass.
        progress: show the stages on stderr.

    Returns:
        The thresholds, greatest rate first.

    Raises:
        ConfigError: a rate is no such decimal.
        ImagesError: the images cannot be read, carry no labels, or form too few pairs for every rate.
        CheckpointError: the model file cannot be read.
        QFaceError: the model gives no finite embeddings.

    Example:
        >>> list(qface.match_thresholds("student.onnx", "faces/", ["1e-1"], identities="first-half").by_fpr)
        ['1e-1']
    """
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("thresholds need to know who is who: pass a folder with one subfolder a person")
    _, impostors = count_pairs(labels)
    measurable = [fpr for fpr, rank in ranks_of(fprs, impostors).items() if rank is not None]
    if not measurable:
        raise ImagesError(f"no threshold can be measured: {unmeasured(fprs, impostors)}")
    embeddings = embed(model, source, batch_size)
    points = tpr_at_fpr(embeddings, labels, sorted(measurable, key=float, reverse=True))
    by_fpr = {fpr: point.threshold for fpr, point in points.items() if point.threshold is not None}
    people = None if identities is None else str(identities)
    return MatchThresholds(by_fpr, len(embeddings), len(set(map(int, labels))), impostors, people)


def write_thresholds(file: str | Path, thresholds: MatchThresholds) -> None:
    """Write ``thresholds`` into the metadata of the ONNX file ``file``, in place of those that it has.

    Changes ``file`` in place and returns nothing.

    Args:
        file: the file; no network, since only files for devices hold thresholds. It is replaced as a whole or not at
            all.
        thresholds: measured with this file, or with the student that it was exported from.

    Raises:
        CheckpointError: the file is missing or damaged.
        ExportError: the file cannot be replaced.

    Example:
        >>> qface.write_thresholds("student.onnx", qface.match_thresholds("student.onnx", "faces/", ["1e-2"]))
    """
    add_metadata(file, {_KEY: json.dumps(thresholds.to_dict())})


def thresholds_of(file: str | Path) -> MatchThresholds | None:
    """The thresholds in the metadata of the ONNX file ``file``. Does not change ``file``.

    Args:
        file: the file; no network, since only files for devices hold thresholds.

    Returns:
        The thresholds, or None where none were written.

    Raises:
        CheckpointError: the file is missing or damaged, or its thresholds cannot be read.

    Example:
        >>> qface.write_thresholds("student.onnx", qface.match_thresholds("student.onnx", "faces/", ["1e-2"]))
        >>> list(qface.thresholds_of("student.onnx").by_fpr)
        ['1e-2']
    """
    text = read_metadata(file).get(_KEY)
    if text is None:
        return None
    try:
        record: dict[str, Any] = parse_json(text, "its thresholds")
        by_fpr = {str(fpr): float(threshold) for fpr, threshold in record["by_fpr"].items()}
        images, identities, impostors = (int(record[key]) for key in ("images", "identities", "impostor_pairs"))
        return MatchThresholds(by_fpr, images, identities, impostors, record["people"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: its thresholds cannot be read ({one_line(error, 200)}); write them again"
        ) from error
