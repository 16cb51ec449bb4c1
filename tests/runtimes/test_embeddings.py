"""Files computed by other runtimes and processors: onnxruntime gives the same embeddings everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.runtimes.conftest import CASES, Exported
from tests.runtimes.runtime import HOST, RUNTIMES, Runtime

EXACT = [name for name, environment in RUNTIMES.items() if environment.exact and name != HOST]
LEAST_COSINE = 0.99999  # of OpenVINO, which rounds floats otherwise: the last product, and nothing before it

pytestmark = [pytest.mark.runtimes, pytest.mark.faces]


def available(name: str) -> Runtime:
    runtime = Runtime(name)
    if reason := runtime.reason_missing():
        pytest.skip(reason)
    return runtime


@pytest.mark.parametrize("runtime", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_every_embedding_is_that_of_the_host(case: str, runtime: str, exported: Callable[[str], Exported]) -> None:
    other = available(runtime)
    network = exported(case)
    embeddings = other.embed(network.file, network.images)
    equal = np.all(embeddings == network.embeddings, axis=1)
    assert equal.all(), f"{equal.sum()} of {len(equal)} embeddings are equal in {runtime} {other.version}"


@pytest.mark.parametrize("case", CASES)
def test_openvino_is_near(case: str, exported: Callable[[str], Exported]) -> None:
    other = available("openvino")
    if CASES[case].weight_bits == 8 and "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("without VNNI, OpenVINO's sums of weights of 8 bits saturate on this processor")
    network = exported(case)
    cosines = cosines_of(other.embed(network.file, network.images), network.embeddings)
    assert cosines.min() >= LEAST_COSINE


def cosines_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return np.sum(one * other, axis=1)
