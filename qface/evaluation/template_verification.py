"""Evaluation of templates (sets of images) by the protocols of IJB-B and IJB-C: 1:1 verification, 1:N identification.

The embedding of a template is the mean of its unnormalized image embeddings, so their norms act as weights
(``use_norm_score`` in InsightFace's ``eval_ijbc.py``). ``"paper"`` is section 4.2 of Ef-QuantFace, the mean over all
images; ``"arcface"`` is ArcFace's protocol, which counts the images of one video as one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.checks import check_choice, check_whole
from qface.choices import TemplateProtocol
from qface.data.template_galleries import read_galleries
from qface.data.templates import TemplateSet, people_of, read_templates
from qface.errors import ConfigError, QFaceError
from qface.evaluation.bootstrap import Interval, bootstrap_tpr_of_scores
from qface.evaluation.embedding import Embeddings, Model, as_embedder
from qface.evaluation.embedding_store import embed_to_file
from qface.evaluation.template_identification import TemplateIdentification, identify_templates
from qface.evaluation.verification import FPRS, tpr_at_fpr_of_scores
from qface.files import temporary_folder
from qface.progress import shows_progress, track
from qface.results import Result

__all__ = ["TemplateProtocol", "TemplateResult", "evaluate_templates", "pair_scores", "template_embeddings"]

_IMAGES = 2**13  # embeddings in memory at a time; a larger template is not split
_PAIRS = 2**15  # pairs scored at a time: 128 MiB for an embedding dimension of 512


@dataclass(frozen=True, repr=False)
class TemplateResult(Result):
    """Result of :func:`evaluate_templates`; rates are fractions 0..1.

    Args:
        protocol: aggregation of images to templates, ``"paper"`` or ``"arcface"``.
        flip: True if embeddings of mirrored images were added.
        detector_score: True if images were weighted by the detector's score.
        tpr_at_fpr: true-positive rate at each false-positive rate over the listed pairs; None if there are too few
            impostor pairs.
        thresholds: cosine above which a pair is accepted, at the same rates.
        images: number of images embedded.
        templates: number of templates.
        genuine_pairs: number of listed genuine pairs.
        impostor_pairs: number of listed impostor pairs.
        runtime: runtime of the model, such as ``"torch cpu"``.
        seconds: total time of the call in this process.
        preprocessing: preprocessing of the model and its source, in words.
        bootstrap: number of bootstrap replicates; 0 for no intervals.
        tpr_intervals: 95 % confidence intervals of ``tpr_at_fpr`` over people; empty without bootstrap.
        identification: figures of 1:N identification; None if the folder does not have its galleries and probes.

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
    bootstrap: int = 0
    tpr_intervals: dict[str, Interval | None] = field(default_factory=dict)
    identification: TemplateIdentification | None = None

    def _key_figures(self) -> Mapping[str, object]:
        return {"templates": self.templates, "protocol": self.protocol, "tpr_at_fpr": self.tpr_at_fpr}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate_templates(
    model: Model,
    folder: str | Path,
    protocol: TemplateProtocol = "paper",
    flip: bool = False,
    detector_score: bool = False,
    run_dir: str | Path | None = None,
    bootstrap: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> TemplateResult:
    """Measure verification of the template pairs of IJB-B or IJB-C, and identification in its two galleries.

    Identification is measured if the folder has the lists of galleries and probes
    (:mod:`qface.data.template_galleries`). Embeddings are streamed through a file, so memory does not grow with the
    number of images. Does not change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        folder: folder of the benchmark (:mod:`qface.data.templates`).
        protocol: ``"paper"`` averages all images of a template; ``"arcface"`` averages each photo or video first, then
            sums the averages.
        flip: add the embedding of the mirrored image.
        detector_score: multiply the embedding of each image by its detector score.
        run_dir: folder for embeddings, from which an interrupted call resumes. None saves nothing.
        bootstrap: number of replicates over people for 95 % confidence intervals
            (:mod:`qface.evaluation.bootstrap`); 200 suffice, 0 computes none. Pairs show one person if genuine pairs
            connect their templates; identification has its own list of subjects.
        batch_size: images per forward pass.
        progress: show progress on stderr.

    Returns:
        TPR and threshold at each FPR, identification rates, and the number of images, templates and pairs.

    Raises:
        ConfigError: the protocol is unknown, ``bootstrap`` is negative, ``run_dir`` holds data of another model, or an
            image has no detector score that ``detector_score`` needs.
        ImagesError: the images or their lists cannot be read, or the lists contradict each other.
        PairsError: the pair list is malformed, contradicts itself or the subjects, or has no genuine or no impostor
            pairs.
        CheckpointError: the model file cannot be read.
        QFaceError: an embedding is not finite.

    Example:
        >>> qface.evaluate_templates("student.onnx", "IJBC", protocol="arcface").runtime
        'onnxruntime CPUExecutionProvider'
    """
    check_choice(TemplateProtocol, protocol=protocol)
    check_whole(0, bootstrap=bootstrap)
    start = time.perf_counter()
    embedder = as_embedder(model)
    templates = read_templates(folder)
    galleries = read_galleries(folder, templates)
    people = people_of(templates) if bootstrap else None
    if detector_score and templates.scores is None:
        raise ConfigError(
            f"some landmarks in {folder} have no detector score: "
            "restore *_name_5pts_score.txt, or leave out detector_score"
        )
    with temporary_folder() if run_dir is None else nullcontext(Path(run_dir)) as kept:
        embeddings = embed_to_file(embedder, templates.images, kept, batch_size, flip)
        weights = templates.scores if detector_score else None
        joined = template_embeddings(embeddings, templates.templates, templates.media, protocol, weights)
        del embeddings
    scores = pair_scores(joined, templates)
    points = tpr_at_fpr_of_scores(scores, templates.same, FPRS)
    sides = None if people is None else (people[templates.first], people[templates.second])
    intervals = {} if sides is None else bootstrap_tpr_of_scores(scores, templates.same, sides, FPRS, bootstrap)
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
        bootstrap=bootstrap,
        tpr_intervals=intervals,
        identification=None if galleries is None else identify_templates(joined, galleries, bootstrap),
    )


def template_embeddings(
    embeddings: Embeddings,
    templates: npt.NDArray[np.int64],
    media: npt.NDArray[np.int64],
    protocol: TemplateProtocol,
    weights: npt.NDArray[np.float32] | None = None,
) -> Embeddings:
    """Aggregate the embeddings of images to L2-normalized embeddings of templates.

    Args:
        embeddings: float32 [images, dimensions], in memory or memory-mapped.
        templates: int64 [images], index of the template of each image; no index is unused.
        media: int64 [images], index of the photo or video of each image.
        protocol: see :func:`evaluate_templates`.
        weights: float32 [images], factors of the embeddings. None: 1 each.

    Returns:
        float32 [templates, dimensions].

    Raises:
        QFaceError: a template's embedding is zero or not finite.
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
    """Yield slices of about :data:`_IMAGES` elements of the sorted ``owners`` that split no template."""
    start = 0
    while start < len(owners):
        last = owners[min(start + _IMAGES, len(owners)) - 1]
        stop = int(np.searchsorted(owners, last, side="right"))
        yield slice(start, stop)
        start = stop


def _starts(*sorted_keys: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Return the indices at which a run of equal keys begins."""
    changes = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    return np.concatenate([[0], 1 + np.flatnonzero(changes)])


def _media_means(
    values: npt.NDArray[np.float64], owners: npt.NDArray[np.int64], media: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Average the images of each template and medium; return the means and their templates."""
    starts = _starts(owners, media)
    counts = np.diff(starts, append=len(owners))
    return np.add.reduceat(values, starts) / counts[:, None], owners[starts]


def _unit_rows(sums: npt.NDArray[np.float64], names: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(sums, axis=1)
    broken = ~(np.isfinite(lengths) & (lengths > 0))
    if broken.any():
        raise QFaceError(
            f"the embeddings of {np.count_nonzero(broken)} templates are zero or not finite "
            f"(first: number {names[broken][0] + 1}): check the model's weights and scales"
        )
    rows: npt.NDArray[np.float64] = sums / lengths[:, None]
    return rows


def pair_scores(joined: Embeddings, templates: TemplateSet) -> npt.NDArray[np.float32]:
    """Compute the cosines of the template pairs, float32 [pairs].

    Args:
        joined: embeddings of the templates, float32 [templates, dimensions], L2-normalized.
        templates: templates with their pairs.
    """
    scores = np.empty(len(templates.same), np.float32)
    starts = range(0, len(scores), _PAIRS)
    for start in track(starts, "score"):
        part = slice(start, start + _PAIRS)
        scores[part] = np.einsum("ij,ij->i", joined[templates.first[part]], joined[templates.second[part]])
    return scores
