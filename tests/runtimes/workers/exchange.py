"""The common part of the workers. A worker is a script that gets a folder and runs ONNX files on images.

The folder holds ``request.json``, ``{"models": [{"path", "dtype", "shape"}], "runs"}``, and for model ``i`` the images
in ``i.in``. With 0 runs the embeddings go to ``i.out`` as float32; else one image is timed. ``response.json`` tells
``{"version", "milliseconds"}``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 5

Model = Callable[[Any], Any]


def serve(open_model: Callable[[str, list[int]], Model], version: str) -> None:
    """Do what the folder in the command line asks for.

    Args:
        open_model: gets a path and the shape of one image [1, 3, height, width]; returns a function from that
            image to its embedding [1, D].
        version: of the runtime.
    """
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    models = [open_model(model["path"], [1, *model["shape"][1:]]) for model in request["models"]]
    inputs = [
        np.fromfile(folder / f"{number}.in", model["dtype"]).reshape(model["shape"])
        for number, model in enumerate(request["models"])
    ]
    times: list[list[float]] = []
    if request["runs"]:
        times = take_turns([(model, images[:1]) for model, images in zip(models, inputs, strict=True)], request["runs"])
    else:
        for number, (model, images) in enumerate(zip(models, inputs, strict=True)):
            rows = [model(images[place : place + 1]) for place in range(len(images))]
            np.concatenate(rows).astype(np.float32).tofile(folder / f"{number}.out")
    (folder / "response.json").write_text(json.dumps({"version": version, "milliseconds": times}))


def take_turns(models: list[tuple[Model, Any]], runs: int) -> list[list[float]]:
    """Milliseconds of ``runs`` calls of each model, in turns, without those of the warm-up."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(WARM_UP + runs):
        for (model, image), measured in zip(models, times, strict=True):
            start = time.perf_counter()
            model(image)
            measured.append(1000 * (time.perf_counter() - start))
    return [measured[WARM_UP:] for measured in times]
