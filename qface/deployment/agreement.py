"""``verify``: does an exported file compute what its student computes, layer by layer and from end to end?

Layer by layer the file is cut open: every layer gets the student's integers as input, so that a difference stays where
it arises. From end to end nothing is given but images, and the embeddings are compared.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qface.data.images import Images, as_image_source, normalise
from qface.deployment import graph as ir
from qface.deployment.lowering import lower
from qface.deployment.runtime import OnnxEmbedder, cpu_session
from qface.errors import ExportError
from qface.preprocessing import CROP_SIZE
from qface.quantization import ImageQuantize, LowBitFakeQuantize

__all__ = ["LAYER_IMAGES", "Agreement", "LayerAgreement", "compare_layers", "synthetic_crops", "verify"]

LEAST_EQUAL = 0.999
"""Share of a layer's integers that must be equal; no other may be off by more than one step."""
LEAST_MEAN_COSINE = 0.9999
LEAST_COSINE = 0.999

LAYER_IMAGES = 8
"""Images on which layers are compared; each gives thousands of integers a layer."""
_SYNTHETIC_IMAGES = 4
Integers = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerAgreement:
    """One layer, both sides given the same integers.

    Args:
        layer: its name.
        operation: its kind.
        bits: width of what it makes.
        elements: integers compared.
        different: how many of them differ.
        greatest_step: by how much at most.
        greatest_level: greatest integer of the file's side.
    """

    layer: str
    operation: str
    bits: int
    elements: int
    different: int
    greatest_step: int
    greatest_level: int

    @property
    def agrees(self) -> bool:
        """Whether it is equal but for a rounding here and there, and keeps to its bits."""
        equal = self.different <= (1 - LEAST_EQUAL) * self.elements
        return equal and self.greatest_step <= 1 and self.greatest_level < 1 << self.bits


@dataclass(frozen=True)
class Agreement:
    """What :func:`verify` found; cosines are between the embeddings of student and file, running free."""

    layers: tuple[LayerAgreement, ...]
    images: int
    mean_cosine: float
    least_cosine: float

    @property
    def agrees(self) -> bool:
        """Whether every layer agrees, and the embeddings do."""
        embeddings = self.mean_cosine >= LEAST_MEAN_COSINE and self.least_cosine >= LEAST_COSINE
        return embeddings and all(layer.agrees for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def verify(student: nn.Module, file: str | Path, images: Images, people: str | Path | None = None) -> Agreement:
    """Compare ``student`` in eval mode with ``file``, which was exported from it.

    Args:
        student: calibrated; its mode is not changed.
        file: the ONNX file.
        images: faces; the first eight serve for the layers, all of them from end to end.
        people: of a folder, which identities.

    Raises:
        ConfigError: the student is not calibrated.
        ExportError: the file was not exported from this network.
        CheckpointError: the file is missing or damaged.
        ImagesError: the images cannot be used.
    """
    embedder = OnnxEmbedder(file, providers=["CPUExecutionProvider"])
    network = copy.deepcopy(student).cpu().eval()
    graph = lower(student)
    layers: tuple[LayerAgreement, ...] = ()
    cosines = []
    for batch in as_image_source(images, people).batches(64):
        inputs = normalise(batch, graph.preprocessing)
        if not layers:
            layers = compare_layers(network, graph, file, inputs[:LAYER_IMAGES])
        with torch.no_grad():
            cosines.append(torch.cosine_similarity(network(inputs), embedder(inputs)))
    found = torch.cat(cosines)
    return Agreement(layers, len(found), float(found.mean()), float(found.min()))


def synthetic_crops(count: int = _SYNTHETIC_IMAGES, seed: int = 0) -> Tensor:
    """Seeded noise, uint8 [count, 3, 112, 112], coarse and fine so that all layers have something to do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    coarse = F.interpolate(coarse, CROP_SIZE, mode="bilinear", align_corners=False)
    fine = torch.rand(count, 3, CROP_SIZE, CROP_SIZE, generator=generator)
    return ((0.8 * coarse + 0.2 * fine) * 255).round().byte()


def compare_layers(
    student: nn.Module, graph: ir.IntegerGraph, file: str | Path, inputs: Tensor
) -> tuple[LayerAgreement, ...]:
    """Each layer of ``file`` beside the student's, given the student's integers for normalised images ``inputs``.

    Args:
        student: calibrated; its mode is not changed.
        graph: what it was lowered to.
        file: what was written of that.
        inputs: float32 [N, 3, height, width].

    Raises:
        ExportError: the file was not exported from this network.
    """
    operations = [operation for operation in graph.operations if _is_rounded(operation)]
    expected = _integers(student, inputs)
    given = {operation.output.name: integers for operation, integers in zip(operations, expected, strict=True)}
    found = _run_cut(Path(file), given, inputs)
    return tuple(_compared(operation, given, found) for operation in operations)


def _is_rounded(operation: ir.Operation) -> bool:
    """Whether the operation ends in a quantizer of its own."""
    return operation.output.grid is not None and not isinstance(operation, (ir.MaxPool, ir.Flatten))


def _integers(student: nn.Module, inputs: Tensor) -> list[Integers]:
    """The integers behind each quantizer of activations, in the order they run."""
    recorder = _Recorder(copy.deepcopy(student).cpu().eval())
    with torch.no_grad():
        recorder.run(inputs)
    return recorder.integers


class _Recorder(fx.Interpreter):
    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.integers: list[Integers] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, (ImageQuantize, LowBitFakeQuantize)):
            scale, zero_point = layer.tensors()
            self.integers.append(((result / scale).round() + zero_point).byte().cpu().numpy())
        return result


def _run_cut(file: Path, given: dict[str, Integers], inputs: Tensor) -> dict[str, Integers]:
    """Run ``file`` with every tensor of ``given`` fed to its readers, and return what its makers make."""
    model = onnx.load(str(file))
    made = {name for node in model.graph.node for name in node.output}
    if not given.keys() <= made:
        raise ExportError(f"{file} was not exported from this network; export it again")
    for node in model.graph.node:
        node.input[:] = [f"{name}:given" if name in given else name for name in node.input]
    for name, integers in given.items():
        shape = list(integers.shape)
        model.graph.input.append(helper.make_tensor_value_info(f"{name}:given", TensorProto.UINT8, shape))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))
    session = cpu_session(model.SerializeToString())
    feeds = {"images": inputs.cpu().numpy(), **{f"{name}:given": integers for name, integers in given.items()}}
    return dict(zip(given, session.run(list(given), feeds), strict=True))


def _compared(operation: ir.Operation, given: dict[str, Integers], found: dict[str, Integers]) -> LayerAgreement:
    name = operation.output.name
    steps = np.abs(given[name].astype(np.int16) - found[name])
    assert operation.output.grid is not None
    return LayerAgreement(
        layer=operation.name,
        operation=type(operation).__name__,
        bits=operation.output.grid.bits,
        elements=steps.size,
        different=int(np.count_nonzero(steps)),
        greatest_step=int(steps.max()),
        greatest_level=int(found[name].max()),
    )
