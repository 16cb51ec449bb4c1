"""A task of benchmarks/peers.py: its inputs, its settings and its result. Needs only numpy.

Each script of this folder quantizes one network with one tool, in the environment of that tool:

    python brevitas_ptq.py INPUTS FOLDER

INPUTS holds ``teacher.onnx``, ``teacher.pt`` (a pickled torch.fx.GraphModule of torch.nn layers), ``calibration.npy``
and ``images.npy``, both float32 [N, 3, height, width]: normalized RGB. FOLDER holds ``settings.json``; the script
writes ``embeddings.npy``, float32 [N, D], and ``result.json`` into it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_WARM_UP = 5


class Task:
    """The task of this process, from its command line.

    Attributes:
        folder: folder of settings and result.
        settings: settings of the row.
        teacher: float network as ONNX.
        torch_teacher: float network for torch.
        calibration: calibration images, float32 [N, 3, height, width].
        cpu_seconds: CPU time of the quantization on all threads, set by :meth:`timing`.
    """

    def __init__(self, arguments: list[str] | None = None) -> None:
        inputs, self.folder = (Path(each) for each in arguments or sys.argv[1:3])
        self.settings: dict[str, Any] = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        self.teacher = inputs / "teacher.onnx"
        self.torch_teacher = inputs / "teacher.pt"
        self.calibration: Array = np.load(inputs / "calibration.npy")
        self.cpu_seconds = 0.0
        self._images: Array = np.load(inputs / "images.npy", mmap_mode="r")

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Measure the CPU time of the quantization."""
        start = time.process_time()
        yield
        self.cpu_seconds = time.process_time() - start

    def batches(self, images: Array, size: int) -> Iterator[Array]:
        """Yield ``images`` in batches."""
        for start in range(0, len(images), size):
            yield np.array(images[start : start + size])

    def finish(
        self,
        embed: Callable[[Array], Array],
        versions: Mapping[str, str],
        batch_size: int = 64,
        files: Iterable[Path] = (),
        latency_ratio: float | None = None,
    ) -> None:
        """Embed all images and write the result.

        Args:
            embed: the quantized network, from images [N, 3, height, width] to embeddings [N, D].
            versions: version of each package that made the network.
            batch_size: images per call.
            files: files of the quantized network; none if the tool only simulates it.
            latency_ratio: CPU time of one image relative to the float network in the same runtime.
        """
        embeddings = np.concatenate([embed(batch) for batch in self.batches(self._images, batch_size)])
        np.save(self.folder / "embeddings.npy", embeddings.astype(np.float32))
        result = {
            "cpu_seconds": self.cpu_seconds,
            "files": [file.name for file in files],
            "latency_ratio": latency_ratio,
            "versions": versions,
        }
        (self.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def latency_ratio(quantized: Callable[[], object], teacher: Callable[[], object], runs: int) -> float:
    """Return the median time of ``quantized`` relative to ``teacher``; their calls alternate.

    It is CPU time, which equals latency on one thread, and does not grow while other processes have the core.
    """
    times: dict[Callable[[], object], list[float]] = {quantized: [], teacher: []}
    for _ in range(_WARM_UP + runs):
        for call, measured in times.items():
            start = time.process_time()
            call()
            measured.append(time.process_time() - start)
    return statistics.median(times[quantized][_WARM_UP:]) / statistics.median(times[teacher][_WARM_UP:])
