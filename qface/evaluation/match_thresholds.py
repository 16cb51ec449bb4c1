"""Match thresholds in the metadata of an ONNX file, for use on devices."""

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
from qface.limits import MALFORMED, parse_json
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["DEVICE_FPRS", "MatchThresholds", "match_thresholds", "thresholds_of", "write_thresholds"]

DEVICE_FPRS = ("1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
"""False-positive rates with a threshold in the file, as exact decimals."""

_KEY = "thresholds"  # metadata key


@dataclass(frozen=True, repr=False)
class MatchThresholds(Result):
    """Cosines above which two faces match if the same model embeds both.

    Args:
        by_fpr: threshold by false-positive rate, a decimal such as ``"1e-4"``.
        images: number of images of the measurement.
        identities: number of identities.
        impostor_pairs: number of impostor pairs.
        people: selection of identities, as given; None for all.

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
        """Return plain Python values, for JSON and file metadata."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the thresholds in one line."""
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
    """Measure the thresholds for matching two faces at several false-positive rates.

    ``model`` embeds both faces of a pair. Does not change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder per identity, or other labeled images.
        fprs: rates as decimals between 0 and 1; rates with fewer than ten accepted impostors are left out.
        identities: identities to use from a folder; None uses all.
        batch_size: images per forward pass.
        progress: show progress on stderr.

    Returns:
        The thresholds, in descending order of their rates.

    Raises:
        ConfigError: a rate is not a decimal between 0 and 1.
        ImagesError: the images cannot be read, are unlabeled, or form too few pairs for every rate.
        CheckpointError: the model file cannot be read.
        QFaceError: an embedding is not finite.

    Example:
        >>> list(qface.match_thresholds("student.onnx", "faces/", ["1e-1"], identities="first-half").by_fpr)
        ['1e-1']
    """
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("thresholds need labeled images: pass a folder with one subfolder per identity")
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
    """Write thresholds into the metadata of an ONNX file, replacing earlier ones.

    Changes ``file`` in place and returns nothing.

    Args:
        file: path of the file, which is replaced atomically.
        thresholds: thresholds measured with this file or its student.

    Raises:
        CheckpointError: the file is missing or damaged.
        ExportError: the file cannot be replaced.

    Example:
        >>> qface.write_thresholds("student.onnx", qface.match_thresholds("student.onnx", "faces/", ["1e-2"]))
    """
    add_metadata(file, {_KEY: json.dumps(thresholds.to_dict())})


def thresholds_of(file: str | Path) -> MatchThresholds | None:
    """Read the thresholds from the metadata of an ONNX file.

    Does not change ``file``.

    Args:
        file: path of the file.

    Returns:
        The thresholds, or None if the file has none.

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
    except MALFORMED as error:
        raise CheckpointError(
            f"the thresholds in {file} cannot be read ({one_line(error, 200)}); write them again"
        ) from error
