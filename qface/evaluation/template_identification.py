"""1:N identification of templates in two published galleries, the protocol of IJB-B and IJB-C.

Both galleries have different subjects, and the probes are searched in each. A probe is mated in the gallery that holds
its subject, and non-mated in the other. A mated probe is identified if the cosine with its mate exceeds the threshold,
at any rank: FNIR(N, R, T) with R = N in NIST's notation, and the miss rate of Klare et al. ("Pushing the Frontiers of
Unconstrained Face Detection and Recognition: IARPA Janus Benchmark A", CVPR 2015).

Rates are measured if at least one non-mated probe may exceed the threshold. The protocol fixes the probes, and 10 false
positives at 1e-3 would need 10,000 non-mated ones per gallery.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qface.data.template_galleries import TemplateGalleries
from qface.evaluation.bootstrap import CONFIDENCE, Draws
from qface.evaluation.embedding import Embeddings
from qface.evaluation.identification import IdentificationRates, Protocol, Search, draw_rates, probe_scores

__all__ = ["GalleryFigures", "TemplateIdentification", "identify_templates"]


@dataclass(frozen=True)
class GalleryFigures:
    """Figures of one gallery.

    Args:
        enrolled: number of subjects in the gallery, with one template each.
        mated_probes: number of probes of these subjects.
        non_mated_probes: number of probes of other subjects.
        thresholds: cosine above which a probe is identified, by false-positive identification rate.
        rates: identification rates.
    """

    enrolled: int
    mated_probes: int
    non_mated_probes: int
    thresholds: dict[str, float | None]
    rates: IdentificationRates


@dataclass(frozen=True)
class TemplateIdentification:
    """Figures of 1:N identification of templates.

    Args:
        mean: mean of the rates of both galleries; None for a rate that one of them does not measure.
        galleries: figures of each gallery by its name, such as ``"G1"``.
    """

    mean: IdentificationRates
    galleries: dict[str, GalleryFigures]


def identify_templates(joined: Embeddings, galleries: TemplateGalleries, bootstrap: int = 0) -> TemplateIdentification:
    """Search the probes in each gallery.

    Args:
        joined: embeddings of the templates, float32 [templates, dimensions], L2-normalized.
        galleries: galleries and probes.
        bootstrap: number of replicates over subjects for 95 % confidence intervals; 0 computes none. A replicate has
            the same subjects for both galleries, and the galleries stay.
    """
    subjects = int(galleries.subjects.max()) + 1
    protocols = {name: _protocol(galleries, enrolled) for name, enrolled in galleries.galleries.items()}
    searches = {name: _search(joined, galleries, protocol) for name, protocol in protocols.items()}
    draws = Draws(subjects, bootstrap, 0, CONFIDENCE, fixed=1) if bootstrap else None
    drawn = draw_rates(list(searches.values()), subjects, draws)
    figures = {
        name: GalleryFigures(
            enrolled=len(protocol.gallery),
            mated_probes=len(protocol.mated),
            non_mated_probes=len(protocol.non_mated),
            thresholds=searches[name].thresholds,
            rates=IdentificationRates.of(drawn[:, at], draws),
        )
        for at, (name, protocol) in enumerate(protocols.items())
    }
    return TemplateIdentification(IdentificationRates.of(drawn.mean(axis=1), draws), figures)


def _protocol(galleries: TemplateGalleries, enrolled: npt.NDArray[np.int64]) -> Protocol:
    mated = np.isin(galleries.subjects[galleries.probes], galleries.subjects[enrolled])
    return Protocol(enrolled, galleries.probes[mated], galleries.probes[~mated])


def _search(joined: Embeddings, galleries: TemplateGalleries, protocol: Protocol) -> Search:
    scores = probe_scores(joined, galleries.subjects, protocol)
    return Search(scores, galleries.subjects, protocol, max_rank=None, min_false_positives=1)
