"""Inputs of the scripts in ``peer_tools/``: the float network and the images, as files that need no qface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

import qface
from qface.data import IndexedImages
from qface.files import make_folder, replacing
from qface.preprocessing import preprocessing_of

TEACHER = "teacher.onnx"


def write_inputs(folder: Path, teacher: nn.Module, calibration: IndexedImages, images: IndexedImages) -> None:
    """Write the inputs of all scripts; files that exist stay.

    Args:
        folder: the folder, which is made.
        teacher: the float network.
        calibration: calibration images, written to ``calibration.npy`` as the network's float input.
        images: images to embed, written to ``images.npy`` likewise.
    """
    make_folder(folder)
    if not (folder / TEACHER).exists():
        qface.export(teacher, folder / TEACHER)
    if not (folder / "teacher.pt").exists():
        with replacing(folder / "teacher.pt") as temporary:
            torch.save(plain_graph(teacher), temporary)
    for name, source in {"calibration.npy": calibration, "images.npy": images}.items():
        if not (folder / name).exists():
            _write_images(folder / name, teacher, source)


def plain_graph(network: nn.Module) -> fx.GraphModule:
    """Return ``network`` as a graph of torch.nn layers, whose pickle needs torch only."""
    graph = fx.symbolic_trace(network)
    for node in graph.graph.nodes:
        node.type = None  # torch.save refuses annotations that are text
    graph.recompile()
    return graph


def _write_images(path: Path, network: nn.Module, images: IndexedImages) -> None:
    pixels = preprocessing_of(network)(images.read(range(len(images))))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, pixels.numpy())
