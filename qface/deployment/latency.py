"""Latency of several files, measured side by side; only ratios within one comparison are meaningful."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qface.deployment.inputs import FLOAT_INPUT, UINT8_INPUT
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import ConfigError
from qface.onnxruntime_import import import_onnxruntime
from qface.preprocessing import Preprocessing, PreprocessingOverride

__all__ = ["Candidate", "Latency", "compare", "median_milliseconds", "open_file"]

_WARM_UP = 5
_SETTLING = 0.05
"""Pause in seconds before a call with several threads: onnxruntime's pool spins for about 35 ms after a call and would
take cores from the next one."""


@dataclass(frozen=True)
class Candidate:
    """Opened network to be timed.

    Attributes:
        name: name in the results.
        embed: function from images [N, 3, height, width] to embeddings.
        size: height and width of the images.
        provider: provider in use, such as onnxruntime's execution provider.
        bytes: file size.
        load_seconds: time to open the file once.
        input: input type, a :data:`qface.choices.InputType`.
        preprocessing: preprocessing of the file, in words.
    """

    name: str
    embed: Callable[[Tensor], object]
    size: tuple[int, int]
    provider: str
    bytes: int
    load_seconds: float
    input: str = FLOAT_INPUT
    preprocessing: str = ""


@dataclass(frozen=True)
class Latency:
    """Measured latency of one candidate.

    Attributes:
        name: name of the candidate.
        provider: provider that ran it.
        threads: threads within an operator.
        batch: batch size.
        runs: number of timed calls.
        median: median time of a call in ms.
        minimum: minimum time of a call in ms.
        ratio: median relative to that of the first candidate.
        bytes: file size.
        load_seconds: time to open the file once.
        preprocessing: preprocessing of the file, in words.
    """

    name: str
    provider: str
    threads: int
    batch: int
    runs: int
    median: float
    minimum: float
    ratio: float
    bytes: int
    load_seconds: float
    preprocessing: str = ""

    @property
    def megabytes(self) -> float:
        """File size in MB (10^6 bytes)."""
        return self.bytes / 1e6

    @property
    def mebibytes(self) -> float:
        """File size in MiB (2^20 bytes)."""
        return self.bytes / 2**20

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values with units in the keys, ready for JSON."""
        return {
            "name": self.name,
            "provider": self.provider,
            "threads": self.threads,
            "batch": self.batch,
            "runs": self.runs,
            "median_ms": self.median,
            "minimum_ms": self.minimum,
            "ratio": self.ratio,
            "bytes": self.bytes,
            "load_seconds": self.load_seconds,
            "preprocessing": self.preprocessing,
        }


def open_file(
    path: str | Path,
    threads: int = 1,
    name: str | None = None,
    providers: Sequence[str] | None = None,
    preprocessing: PreprocessingOverride | None = None,
) -> Candidate:
    """Open an ONNX file as a candidate.

    Args:
        path: path of the file.
        threads: threads within an operator.
        name: name in the results. None: the path.
        providers: onnxruntime's execution providers in order of preference, as in :class:`OnnxEmbedder`.
        preprocessing: preprocessing, or some fields of it, as in :class:`OnnxEmbedder`.

    Raises:
        CheckpointError: the file is missing, damaged, or not a network from images to embeddings.
        ConfigError: threads is below 1, or the installed onnxruntime does not have a provider.
    """
    _check_counts(threads=threads)
    import_onnxruntime()  # takes half a second, which must not count as load time
    start = time.perf_counter()
    embedder = OnnxEmbedder(path, providers, threads, preprocessing)
    seconds = time.perf_counter() - start
    return Candidate(
        name or str(path),
        embedder,
        embedder.preprocessing.size,
        embedder.provider,
        embedder.path.stat().st_size,
        seconds,
        embedder.input,
        embedder.preprocessing.describe(),
    )


def compare(candidates: Sequence[Candidate], threads: int = 1, batch: int = 1, runs: int = 40) -> list[Latency]:
    """Time all candidates alternately, so that load on the machine affects all of them equally.

    Args:
        candidates: opened files; ratios are relative to the first.
        threads: number of threads they were opened with.
        batch: batch size.
        runs: number of timed calls per candidate, after a warm-up.

    Returns:
        One result per candidate, in order.

    Raises:
        ConfigError: a count is below 1.
    """
    _check_counts(threads=threads, batch=batch, runs=runs)
    images = [_random_images(batch, candidate) for candidate in candidates]
    times = _time_alternately(
        [candidate.embed for candidate in candidates], images, runs, _SETTLING if threads > 1 else 0
    )
    medians = [1000 * statistics.median(measured) for measured in times]
    return [
        Latency(
            candidate.name,
            candidate.provider,
            threads,
            batch,
            runs,
            median,
            1000 * min(measured),
            median / medians[0],
            candidate.bytes,
            candidate.load_seconds,
            candidate.preprocessing,
        )
        for candidate, measured, median in zip(candidates, times, medians, strict=True)
    ]


def median_milliseconds(files: Sequence[str | Path], threads: int = 1, batch: int = 1, runs: int = 40) -> list[float]:
    """Measure the median latency of ONNX files in onnxruntime; see :func:`compare`.

    Args:
        files: paths of the files.
        threads: threads within an operator.
        batch: batch size.
        runs: number of timed calls per file, after a warm-up.

    Returns:
        Median time of a call in ms, for each file.

    Raises:
        CheckpointError: a file is missing, damaged, or not a network from images to embeddings.
        ConfigError: a count is below 1.
    """
    return [row.median for row in compare([open_file(file, threads) for file in files], threads, batch, runs)]


def _time_alternately(
    calls: Sequence[Callable[[Tensor], object]], images: Sequence[Tensor], runs: int, pause: float
) -> list[list[float]]:
    """Measure the seconds of ``runs`` calls each, without those of the warm-up.

    Each round has a random order, because a call affects the next one through caches and threads.
    """
    times: list[list[float]] = [[] for _ in calls]
    turns = list(zip(calls, images, times, strict=True))
    shuffle = random.Random(0).shuffle
    for _ in range(_WARM_UP + runs):
        shuffle(turns)
        for call, batch, measured in turns:
            time.sleep(pause)
            start = time.perf_counter()
            call(batch)
            measured.append(time.perf_counter() - start)
    return [measured[_WARM_UP:] for measured in times]


def _random_images(batch: int, candidate: Candidate) -> Tensor:
    pixels = torch.randint(256, (batch, 3, *candidate.size), generator=torch.Generator().manual_seed(0)).byte()
    return pixels if candidate.input == UINT8_INPUT else Preprocessing().normalize(pixels)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {count}")
