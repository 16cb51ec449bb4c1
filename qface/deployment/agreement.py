"""``verify``: does an exported file compute what its student computes, layer by layer and from end to end?

Layer by layer the file is cut open: every layer gets the student's integers as input, so that a difference stays where
it arises. From end to end nothing is given but images, and the embeddings are compared. A file that computes in floats
rounds weights only; it is compared from end to end with a student that does the same. A file that OpenVINO runs is
compared from end to end too: it does not show its integers without computing others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from qface.choices import RUNTIMES, RuntimeName
from qface.data.images import Images, ImageSource, normalize
from qface.data.sources import as_image_source
from qface.deployment import integer_graph as ir
from qface.deployment.inputs import as_model_sees, to_file_input, with_input_dtype
from qface.deployment.lowering import lower, value_name
from qface.deployment.openvino_runtime import OpenVinoEmbedder
from qface.deployment.runtime import OnnxEmbedder, cpu_session, providers_for
from qface.errors import ConfigError, ExportError, ImagesError
from qface.graph.queries import layer_of
from qface.models.resolve import NetworkLike, as_network
from qface.quantization import ImageFakeQuantize, LSQFakeQuantize, QuantizedAffine
from qface.quantization.binding import layers_near_ties
from qface.quantization.quantized_layers import Quantizer, WeightedLayer
from qface.results import Result

__all__ = [
    "LAYER_IMAGES",
    "RUNTIMES",
    "Agreement",
    "LayerAgreement",
    "compare_embeddings",
    "compare_layers",
    "verify",
    "without_rounded_activations",
]


LEAST_EQUAL = 0.999
"""Share of the integers that must be equal where floats are rounded; no other may be off by more than one step."""
LEAST_MEAN_COSINE = 0.9999
LEAST_COSINE = 0.999
LEAST_MEAN_COSINE_WITH_FLOAT = 0.99
LEAST_COSINE_WITH_FLOAT = 0.95
"""Of networks with float islands. Torch and onnxruntime sum floats in another order; a difference of 1e-7 rounds one of
every few thousand values the other way, and the layers after it spread that. Each layer alone must agree as elsewhere.
"""

LAYER_IMAGES = 8
"""Images on which layers are compared; each gives thousands of integers a layer."""
Integers = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerAgreement:
    """One layer, both sides given the same integers.

    Args:
        layer: its name.
        operation: its kind.
        bits: of what it makes.
        elements: integers compared.
        different: how many of them differ.
        greatest_step: by how much at most.
        integer_range: least and greatest integer of the file's side.
        exact: True where every processor makes the same integers of the same integers, so that none may differ. A layer
            that rounds floats, or that lies near a tie (:func:`qface.quantization.binding.layers_near_ties`), is not.
    """

    layer: str
    operation: str
    bits: int
    elements: int
    different: int
    greatest_step: int
    integer_range: tuple[int, int]
    exact: bool = True

    @property
    def agrees(self) -> bool:
        """True if it is equal, but for a rounding here and there where it is not exact, and keeps to its bits."""
        allowed = 0 if self.exact else (1 - LEAST_EQUAL) * self.elements
        equal = self.different <= allowed and self.greatest_step <= 1
        return equal and self.integer_range[1] - self.integer_range[0] < 1 << self.bits


@dataclass(frozen=True, repr=False)
class Agreement(Result):
    """The result of :func:`verify`; cosines are between the embeddings of student and file, each from end to end.

    A file that computes in floats has no integer layers, and those of OpenVINO are not seen.

    Args:
        layers: with integer results, one by one.
        images: whose embeddings were compared.
        mean_cosine: of their embeddings.
        least_cosine: likewise.
        float_layers: names of the float islands, between which integers may differ by a rounding.
        runtime: that ran the file, one of :data:`RUNTIMES`.
        preprocessing: what both read and who says so, in words.
    """

    layers: tuple[LayerAgreement, ...]
    images: int
    mean_cosine: float
    least_cosine: float
    float_layers: tuple[str, ...] = ()
    runtime: str = "onnxruntime"
    preprocessing: str = ""

    @property
    def agrees(self) -> bool:
        """True if every layer agrees, and the embeddings do."""
        mean, least = (
            (LEAST_MEAN_COSINE_WITH_FLOAT, LEAST_COSINE_WITH_FLOAT)
            if self.float_layers
            else (LEAST_MEAN_COSINE, LEAST_COSINE)
        )
        embeddings = self.mean_cosine >= mean and self.least_cosine >= least
        return embeddings and all(layer.agrees for layer in self.layers)

    def _key_figures(self) -> Mapping[str, object]:
        return {
            "agrees": self.agrees,
            "images": self.images,
            "layers": len(self.layers),
            "least_cosine": self.least_cosine,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def verify(
    student: NetworkLike,
    file: str | Path,
    images: Images,
    identities: str | Path | None = None,
    runtime: RuntimeName = "onnxruntime",
) -> Agreement:
    """Compare ``student`` in eval mode with ``file``, which was exported from it. Does not change ``student``.

    A file for GPUs (``target="cuda"``) runs on one where there is one, all others on the CPU.

    Args:
        student: calibrated: a module, the path of its file, or ``package.module:factory``.
        file: the ONNX file.
        images: faces; the first eight serve for the layers, all of them from end to end.
        identities: of a folder, which identities.
        runtime: that runs the file: ``"onnxruntime"``, or ``"openvino"``, from end to end only.

    Raises:
        ConfigError: the student is not calibrated, or there is no such runtime.
        DependencyError: OpenVINO is wanted and not installed.
        ExportError: the file was not exported from this network.
        CheckpointError: a file is missing or damaged.
        ImagesError: the images cannot be used.

    Example:
        >>> found = qface.verify(student, "student.onnx", "faces/")
        >>> found.images, found.agrees
        (72, True)
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime {runtime!r} is none of {', '.join(RUNTIMES)}")
    student = as_network(student)
    graph = lower(student)
    on_openvino = runtime == "openvino"
    embedder = OpenVinoEmbedder(file) if on_openvino else OnnxEmbedder(file, providers=["CPUExecutionProvider"])
    graph = with_input_dtype(embedder.input, graph)
    batches = _batches(graph, as_image_source(images, identities))
    read = graph.preprocessing.describe()
    in_floats = embedder.target != "cpu"
    if not (in_floats or on_openvino):
        return replace(compare_integers(student, graph, embedder, batches), preprocessing=read)
    if not on_openvino:
        embedder = OnnxEmbedder(file, providers_for(embedder.target))
    network = without_rounded_activations(student) if in_floats else copy.deepcopy(student).cpu().eval()
    return replace(compare_embeddings(network, embedder, batches), runtime=runtime, preprocessing=read)


def compare_integers(
    student: nn.Module, graph: ir.IntegerGraph, embedder: OnnxEmbedder, batches: Iterator[Tensor]
) -> Agreement:
    """Compare ``student`` with a file of integers, layer by layer on the same integers, and from end to end.

    Args:
        student: calibrated, on any device; it is not changed.
        graph: what it was lowered to, as the file reads it.
        embedder: the file, on the CPU.
        batches: float32 [N, 3, height, width], normalized, at least one; the first images of the first serve for the
            layers.

    Raises:
        ExportError: the file was not exported from this network.
    """
    first = next(batches)
    layers = compare_layers(student, graph, embedder.path, first[:LAYER_IMAGES])
    network = copy.deepcopy(student).cpu().eval()
    islands = tuple(each.name for each in graph.operations if isinstance(each, ir.FloatIslandOp))
    found = compare_embeddings(network, embedder, chain([first], batches))
    return replace(found, layers=layers, float_layers=islands)


def _batches(graph: ir.IntegerGraph, source: ImageSource) -> Iterator[Tensor]:
    """Normalized images as the network of ``graph`` sees them; at least one batch."""
    batches = source.batches(64)
    first = next(batches, None)
    if first is None:
        raise ImagesError("there are no images to compare: pass at least one")
    for batch in chain([first], batches):
        yield as_model_sees(graph, normalize(batch, graph.preprocessing))


def compare_embeddings(network: nn.Module, embedder: OnnxEmbedder, batches: Iterable[Tensor]) -> Agreement:
    """The cosines between the embeddings of both, without layers.

    Args:
        network: on the CPU, in eval mode.
        embedder: the file.
        batches: float32 [N, 3, height, width], normalized.

    Raises:
        ExportError: the embeddings have different sizes.
    """
    found = torch.cat([_cosines(network, embedder, batch) for batch in batches])
    return Agreement((), len(found), float(found.mean()), float(found.min()))


def _cosines(network: nn.Module, embedder: OnnxEmbedder, images: Tensor) -> Tensor:
    with torch.no_grad():
        expected, found = network(images), embedder(images)
    if expected.shape != found.shape:
        raise ExportError(f"{embedder.path} was not exported from this network; export it again")
    return torch.cosine_similarity(expected, found)


def without_rounded_activations(student: nn.Module) -> nn.Module:
    """A copy of ``student`` on the CPU, in eval mode, whose parameters are rounded and whose activations are not."""
    network = copy.deepcopy(student).cpu().eval()
    assert isinstance(network, fx.GraphModule)
    layers = {str(node.target): layer_of(node) for node in network.graph.nodes}
    for layer in layers.values():
        _round_parameters(layer)
    for name, layer in layers.items():
        if isinstance(layer, ImageFakeQuantize):
            network.add_submodule(name, _Shift(layer.offset))
        if isinstance(layer, (ImageFakeQuantize, LSQFakeQuantize)):
            layer.disable_fake_quant()
    return network


@torch.no_grad()
def _round_parameters(layer: nn.Module | None) -> None:
    """Round those that the layer itself rounds only where its quantizers are on; weights have one of their own."""
    if isinstance(layer, WeightedLayer):
        (quantizer,) = layer.quant_context.inputs
        if layer.bias is not None and quantizer is not None:
            layer.bias.copy_(layer.rounded_bias())
    elif isinstance(layer, QuantizedAffine) and layer.quant_context.rounding:
        weight, step, bias = layer.integers()
        layer.weight.copy_(weight * step)
        layer.bias.copy_(bias * (layer.quant_context.scales()[0] * step))


class _Shift(nn.Module):
    """Subtracts the offset of an :class:`ImageFakeQuantize`, without rounding."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x - self.offset


def compare_layers(
    student: nn.Module, graph: ir.IntegerGraph, file: str | Path, inputs: Tensor
) -> tuple[LayerAgreement, ...]:
    """Each layer of ``file`` beside the student's, given the student's integers for normalized images ``inputs``.

    Args:
        student: calibrated; its mode is not changed.
        graph: what it was lowered to, reading what ``file`` reads.
        file: what was written of that.
        inputs: float32 [N, 3, height, width], as :func:`qface.deployment.inputs.as_model_sees`.

    Raises:
        ExportError: the file was not exported from this network.
    """
    operations = [operation for operation in graph.operations if _is_rounded(operation)]
    given = _integers(student, inputs, {operation.output.name for operation in operations})
    found = _run_cut(Path(file), given, to_file_input(graph, inputs))
    near_ties = layers_near_ties(cast(fx.GraphModule, student))
    return tuple(
        _compared(operation, given, found, _reads_integers(operation) and operation.name not in near_ties)
        for operation in operations
    )


def _reads_integers(operation: ir.IntegerOp) -> bool:
    """True if no float that another kernel has summed is rounded; a normalized byte is none."""
    return isinstance(operation, ir.QuantizeImageOp) or all(value.qparams is not None for value in operation.inputs)


_MOVES = (ir.MaxPoolOp, ir.FlattenOp, ir.MoveOp, ir.PadOp)


def _is_rounded(operation: ir.IntegerOp) -> bool:
    """True if the operation ends in a quantizer of its own."""
    return operation.output.qparams is not None and not isinstance(operation, _MOVES)


def _integers(student: nn.Module, inputs: Tensor, values: set[str]) -> dict[str, Integers]:
    """The integers behind each quantizer of activations, by which of ``values`` they are."""
    recorder = _Recorder(copy.deepcopy(student).cpu().eval(), values)
    with torch.no_grad():
        recorder.run(inputs)
    return recorder.integers


class _Recorder(fx.Interpreter):
    def __init__(self, student: nn.Module, values: set[str]) -> None:
        super().__init__(student)
        self.integers: dict[str, Integers] = {}
        self._values = values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, Quantizer):
            scale, zero_point, *_ = layer.qparams()
            self.integers[self._value(n)] = ((result / scale).round() + zero_point).byte().cpu().numpy()
        return result

    def _value(self, quantizer: fx.Node) -> str:
        """The name of the value that ``quantizer`` rounds: its own, or the one before it, since a clamp is no value."""
        node = quantizer
        while value_name(node) not in self._values:
            (node,) = node.all_input_nodes
        return value_name(node)


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


def _compared(
    operation: ir.IntegerOp, given: dict[str, Integers], found: dict[str, Integers], exact: bool
) -> LayerAgreement:
    name = operation.output.name
    steps = np.abs(given[name].astype(np.int16) - found[name])
    assert operation.output.qparams is not None
    return LayerAgreement(
        layer=operation.name,
        operation=operation.kind,
        bits=operation.output.qparams.bits,
        elements=steps.size,
        different=int(np.count_nonzero(steps)),
        greatest_step=int(steps.max()),
        integer_range=(int(found[name].min()), int(found[name].max())),
        exact=exact,
    )
