"""Files computed by other runtimes and processors: onnxruntime gives the same embeddings everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.runtimes.conftest import CASES, Exported
from tests.runtimes.runtime import HOST, RUNTIMES, Embeddings, Runtime

EXACT = [name for name, environment in RUNTIMES.items() if environment.exact and name != HOST]
MIN_COSINE = 0.99999  # of OpenVINO, which rounds floats otherwise: the last product, and nothing before it

pytestmark = [pytest.mark.runtimes, pytest.mark.faces]


def embedded(name: str, cases: list[str], exported: Callable[[str], Exported]) -> dict[str, tuple[Embeddings, ...]]:
    """Embeddings of the faces of each case by the runtime ``name`` and by the host; one process for all."""
    runtime = Runtime(name)
    if reason := runtime.reason_missing():
        pytest.skip(reason)
    # Each runtime begins with another case, so that processes of a test run make different files first.
    start = list(RUNTIMES).index(name) % len(cases)
    networks = {case: exported(case) for case in cases[start:] + cases[:start]}
    found = runtime.embed_files([(network.file, network.images) for network in networks.values()])
    return {case: (one, networks[case].embeddings) for case, one in zip(networks, found, strict=True)}


@pytest.mark.parametrize("runtime", EXACT)
def test_every_embedding_is_that_of_the_host(runtime: str, exported: Callable[[str], Exported]) -> None:
    equal = {
        case: f"{np.all(one == host, axis=1).sum()} of {len(host)}"
        for case, (one, host) in embedded(runtime, list(CASES), exported).items()
    }
    assert equal == {case: f"{CASES[case].images} of {CASES[case].images}" for case in equal}


def test_openvino_computes_the_same_integers(exported: Callable[[str], Exported]) -> None:
    # Its sums of weights of 8 bits saturate on processors without VNNI; those with it were not tried.
    cases = [case for case in CASES if CASES[case].weight_bits < 8]
    least = {case: cosines_of(*both).min() for case, both in embedded("openvino", cases, exported).items()}
    assert min(least.values()) >= MIN_COSINE, least


def cosines_of(one: Embeddings, other: Embeddings) -> Embeddings:
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return np.sum(one * other, axis=1)
