"""Latency of files in onnxruntime, side by side: only the ratios within one comparison mean anything."""

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
"""Seconds between calls on several threads: onnxruntime's pool spins for about 35 ms after one, and would take the
cores from whoever comes next."""


@dataclass(frozen=True)
class Candidate:
    """A network that is open and can be timed.

    Attributes:
        name: for the row.
        embed: maps images [N, 3, height, width] to embeddings.
        size: height and width of the images.
        provider: what really computes, such as onnxruntime's execution provider.
        bytes: on disk.
        load_seconds: that opening took, once.
        input: what it reads, one of :data:`qface.deployment.inputs.INPUTS`.
        preprocessing: how images are normalized for it, in words.
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
    """One candidate's row.

    Attributes:
        name: of the candidate.
        provider: what really computed.
        threads: within an operation.
        batch: images a call.
        runs: timed calls.
        median: milliseconds of a call.
        minimum: milliseconds of the fastest call.
        ratio: the median as a multiple of the first candidate's.
        bytes: on disk.
        load_seconds: that opening took, once.
        preprocessing: how images are normalized for it, in words.
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
        """On disk, in 10^6 bytes."""
        return self.bytes / 1e6

    @property
    def mebibytes(self) -> float:
        """On disk, in 2^20 bytes."""
        return self.bytes / 2**20

    def to_dict(self) -> dict[str, Any]:
        """Plain values with their units in the names, for JSON."""
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
    """Open an ONNX file that embeds images.

    Args:
        path: the file.
        threads: that onnxruntime may use within an operation.
        name: for the row; by default the path.
        providers: onnxruntime's execution providers in order of preference, as in :class:`OnnxEmbedder`.
        preprocessing: what the file reads, or some fields of that, as in :class:`OnnxEmbedder`.

    Raises:
        CheckpointError: the file is missing or damaged, or is no network from images to embeddings.
        ConfigError: a count is below 1, or a provider is unknown to the installed onnxruntime.
    """
    _check_counts(threads=threads)
    import_onnxruntime()  # half a second, which is not the file's
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
    """Time all ``candidates``, one call of each in turn, so that whatever else the machine does meets all alike.

    Args:
        candidates: the first one is what the others are measured by.
        threads: that they were opened with.
        batch: images a call.
        runs: timed calls of each, after a warm-up.

    Raises:
        ConfigError: a count is below 1.
    """
    _check_counts(threads=threads, batch=batch, runs=runs)
    images = [_random_images(batch, candidate) for candidate in candidates]
    times = _take_turns([candidate.embed for candidate in candidates], images, runs, _SETTLING if threads > 1 else 0)
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
    """Median milliseconds of one call, for each file; see :func:`compare`."""
    return [row.median for row in compare([open_file(file, threads) for file in files], threads, batch, runs)]


def _take_turns(
    calls: Sequence[Callable[[Tensor], object]], images: Sequence[Tensor], runs: int, pause: float
) -> list[list[float]]:
    """Seconds of ``runs`` calls each, without those of the warm-up.

    Each round has another order, so that what one leaves in the caches and threads does not always meet the same next.
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
            raise ConfigError(f"{name} is {count}; it must be 1 or more")
