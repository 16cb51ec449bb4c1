"""How long a file takes in onnxruntime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qface.deployment.runtime import OnnxEmbedder

__all__ = ["median_milliseconds"]

_WARM_UP = 5


def median_milliseconds(files: Sequence[str | Path], threads: int = 1, batch: int = 1, runs: int = 40) -> list[float]:
    """Median milliseconds of one call, for each file.

    The files take turns, so that whatever else the machine does meets all of them alike: compare the figures of one
    call as ratios, and nothing else.

    Args:
        files: ONNX files that embed images.
        threads: threads that onnxruntime may use within an operation.
        batch: images a call.
        runs: timed calls of each file, after a warm-up.
    """
    embedders = [OnnxEmbedder(file, threads=threads) for file in files]
    images = [torch.zeros(batch, 3, *embedder.preprocessing.size) for embedder in embedders]
    times: list[list[float]] = [[] for _ in files]
    for _ in range(_WARM_UP + runs):
        for embedder, image, measured in zip(embedders, images, times, strict=True):
            start = time.perf_counter()
            embedder(image)
            measured.append(time.perf_counter() - start)
    return [1000 * statistics.median(measured[_WARM_UP:]) for measured in times]
