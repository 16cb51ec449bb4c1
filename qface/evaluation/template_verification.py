"""1:1 verification of templates, as IJB-B and IJB-C are evaluated: all images of a template are compared at once.

An embedding of a template is a mean of the embeddings of its images as the network gives them, so that the length of
an embedding is its weight (``use_norm_score`` of InsightFace's ``eval_ijbc.py``). ``"paper"`` is Ef-QuantFace's section
4.2, the mean of all images; ``"arcface"`` is ArcFace's, in which the images of one video count as one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from qface.choices import TemplateProtocol
from qface.data.templates import TemplateSet, read_templates
from qface.errors import ConfigError, QFaceError
from qface.evaluation.embedding import Embeddings, Model, as_embedder
from qface.evaluation.embedding_store import embed_to_file
from qface.evaluation.verification import FPRS, tpr_at_fpr_of_scores
from qface.files import temporary_folder
from qface.progress import shows_progress, track
from qface.results import Result

__all__ = ["TemplateProtocol", "TemplateResult", "evaluate_templates", "pair_scores", "template_embeddings"]

_IMAGES = 2**13  # embeddings held at a time, save where one template has more
_PAIRS = 2**15  # pairs scored at a time: 128 MiB of embeddings of 512 dimensions


@dataclass(frozen=True, repr=False)
class TemplateResult(Result):
    """The result of :func:`evaluate_templates`; shares are fractions, 0..1.

    Args:
        protocol: how images were joined to templates, ``"paper"`` or ``"arcface"``.
        flip: whether mirrored images were added.
        detector_score: whether images were weighted by the detector's score.
        tpr_at_fpr: true-positive rate at each false-positive rate over the listed pairs; None where there are too few
            impostor pairs to measure it.
        thresholds: the cosine above which a pair is accepted, for the same rates.
        images: images embedded.
        templates: templates they make up.
        genuine_pairs: listed pairs of one person.
        impostor_pairs: listed pairs of two people.
        runtime: what computed the embeddings, such as ``"torch cpu"``.
        seconds: time for all of it in this process.
        preprocessing: what the model reads and who says so, in words.

    Example:
        >>> qface.evaluate_templates("student.onnx", "IJBC").images > 0
        True
    """

    protocol: TemplateProtocol
    flip: bool
    detector_score: bool
    tpr_at_fpr: dict[str, float | None]
    thresholds: dict[str, float | None]
    images: int
    templates: int
    genuine_pairs: int
    impostor_pairs: int
    runtime: str
    seconds: float
    preprocessing: str = ""

    def _key_figures(self) -> Mapping[str, object]:
        return {"templates": self.templates, "protocol": self.protocol, "tpr_at_fpr": self.tpr_at_fpr}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate_templates(
    model: Model,
    folder: str | Path,
    protocol: TemplateProtocol = "paper",
    flip: bool = False,
    detector_score: bool = False,
    run_dir: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> TemplateResult:
    """Verify the pairs of templates of IJB-B or IJB-C.

    Embeddings go to a file as they are computed, and are read from it in parts, so that memory does not grow with the
    images. Does not change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        folder: the benchmark's folder (:mod:`qface.data.templates`).
        protocol: ``"paper"`` takes the mean over the images of a template, ``"arcface"`` over those of each photo or
            video first, and then the sum of these.
        flip: add the embedding of each mirrored image.
        detector_score: multiply the embedding of each image by the detector's score.
        run_dir: folder to keep the embeddings in; a run that was stopped goes on there. None keeps nothing.
        batch_size: images a forward pass.
        progress: show the stages on stderr.

    Raises:
        ConfigError: there is no such protocol, ``run_dir`` is of another model, or ``detector_score`` is asked for and
            an image has none.
        ImagesError: the images or their lists cannot be read.
        PairsError: the list of pairs is malformed, or holds only one kind of pairs.
        QFaceError: the model gives no finite embeddings.

    Example:
        >>> qface.evaluate_templates("student.onnx", "IJBC", protocol="arcface").runtime
        'onnxruntime CPUExecutionProvider'
    """
    if protocol not in get_args(TemplateProtocol):
        raise ConfigError(f"protocol is one of {', '.join(get_args(TemplateProtocol))}, not {protocol!r}")
    start = time.perf_counter()
    embedder = as_embedder(model)
    templates = read_templates(folder)
    if detector_score and templates.scores is None:
        raise ConfigError(
            f"the landmarks in {folder} lack a detector's score for some images: "
            "restore *_name_5pts_score.txt, or do without detector_score"
        )
    with temporary_folder() if run_dir is None else nullcontext(Path(run_dir)) as kept:
        embeddings = embed_to_file(embedder, templates.images, kept, batch_size, flip)
        weights = templates.scores if detector_score else None
        joined = template_embeddings(embeddings, templates.templates, templates.media, protocol, weights)
        del embeddings
    scores = pair_scores(joined, templates)
    points = tpr_at_fpr_of_scores(scores, templates.same, FPRS)
    genuine = int(np.count_nonzero(templates.same))
    return TemplateResult(
        protocol=protocol,
        flip=flip,
        detector_score=detector_score,
        tpr_at_fpr={fpr: point.tpr for fpr, point in points.items()},
        thresholds={fpr: point.threshold for fpr, point in points.items()},
        images=len(templates.images),
        templates=len(templates.names),
        genuine_pairs=genuine,
        impostor_pairs=len(templates.same) - genuine,
        runtime=str(getattr(embedder, "runtime", type(embedder).__name__)),
        seconds=time.perf_counter() - start,
        preprocessing=embedder.preprocessing.describe(),
    )


def template_embeddings(
    embeddings: Embeddings,
    templates: npt.NDArray[np.int64],
    media: npt.NDArray[np.int64],
    protocol: TemplateProtocol,
    weights: npt.NDArray[np.float32] | None = None,
) -> Embeddings:
    """Join the embeddings of images to one of each template, of length 1.

    Args:
        embeddings: float32 [images, dimensions], in memory or mapped from a file.
        templates: int64 [images], which template each image belongs to, each from 0 on at least once.
        media: int64 [images], the photo or video that each comes from.
        protocol: see :func:`evaluate_templates`.
        weights: float32 [images], factors of the embeddings.

    Returns:
        float32 [templates, dimensions].

    Raises:
        QFaceError: a template's embedding is not finite, or zero.
    """
    order = np.lexsort((media, templates))
    joined = np.empty((int(templates.max()) + 1, embeddings.shape[1]), np.float32)
    for block in _whole_templates(templates[order]):
        rows = order[block]
        values = np.asarray(embeddings[rows], np.float64)
        if weights is not None:
            values *= weights[rows, None]
        owners = templates[rows]
        if protocol == "arcface":
            values, owners = _media_means(values, owners, media[rows])
        starts = _starts(owners)
        joined[owners[starts]] = _unit_rows(np.add.reduceat(values, starts), owners[starts])
    return joined


def _whole_templates(owners: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Slices of about :data:`_IMAGES` of ``owners``, which are sorted, that cut no template."""
    start = 0
    while start < len(owners):
        last = owners[min(start + _IMAGES, len(owners)) - 1]
        stop = int(np.searchsorted(owners, last, side="right"))
        yield slice(start, stop)
        start = stop


def _starts(*sorted_keys: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Indices at which a run of equal keys begins."""
    changes = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    return np.concatenate([[0], 1 + np.flatnonzero(changes)])


def _media_means(
    values: npt.NDArray[np.float64], owners: npt.NDArray[np.int64], media: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The mean of each template's images of one media, and the template."""
    starts = _starts(owners, media)
    counts = np.diff(starts, append=len(owners))
    return np.add.reduceat(values, starts) / counts[:, None], owners[starts]


def _unit_rows(sums: npt.NDArray[np.float64], names: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(sums, axis=1)
    broken = ~(np.isfinite(lengths) & (lengths > 0))
    if broken.any():
        raise QFaceError(
            f"the embeddings of {np.count_nonzero(broken)} templates are not finite or are zero "
            f"(first: the {names[broken][0] + 1}th): check the model's weights and scales"
        )
    rows: npt.NDArray[np.float64] = sums / lengths[:, None]
    return rows


def pair_scores(joined: Embeddings, templates: TemplateSet) -> npt.NDArray[np.float32]:
    """The cosine of each pair of ``templates``, float32 [pairs], from ``joined`` [templates, dimensions]."""
    scores = np.empty(len(templates.same), np.float32)
    starts = range(0, len(scores), _PAIRS)
    for start in track(starts, "score"):
        part = slice(start, start + _PAIRS)
        scores[part] = np.einsum("ij,ij->i", joined[templates.first[part]], joined[templates.second[part]])
    return scores
