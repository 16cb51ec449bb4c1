"""Comparison of an exported file with its student, layer by layer and end to end.

Layer by layer: every layer of the file gets the student's integers as input, so that a difference does not spread to
later layers. End to end: both get the same images, and their embeddings are compared. Files with target ``"cuda"`` or
``"float32"`` round only weights; they are compared end to end with a student that does not round activations. OpenVINO
is compared end to end only, because extra outputs for its integers change what it computes.
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

from qface.checks import check_choice
from qface.choices import RuntimeName
from qface.data.images import Images, ImageSource, normalize
from qface.data.sources import as_image_source
from qface.deployment import integer_graph as ir
from qface.deployment.inputs import as_model_sees, to_file_input, with_input_dtype
from qface.deployment.lowering import lower, value_name
from qface.deployment.openvino_runtime import OpenVinoEmbedder
from qface.deployment.runtime import OnnxEmbedder, cpu_session, providers_for
from qface.errors import ExportError, ImagesError
from qface.graph.layers import along_channels
from qface.graph.queries import layer_of
from qface.models.resolve import NetworkLike, as_network
from qface.quantization import ImageFakeQuantize, LSQFakeQuantize, QuantizedAffine
from qface.quantization.binding import layers_near_ties
from qface.quantization.quantized_layers import Quantizer, WeightedLayer
from qface.quantization.student_modes import deployed_on_cpu
from qface.results import Result

__all__ = [
    "LAYER_IMAGES",
    "Agreement",
    "LayerAgreement",
    "compare_embeddings",
    "compare_layers",
    "verify",
    "without_rounded_activations",
]


MIN_EQUAL = 0.999
"""Minimum fraction of equal integers in layers that round floats; the others may be off by one.

Values near a tie do not count: many pixels may have one value, which then round differently together."""
_TIE = 1e-3  # steps from a rounding tie, within which the order of a float sum may decide
MIN_MEAN_COSINE = 0.9999
MIN_COSINE = 0.999
MIN_MEAN_COSINE_WITH_FLOAT = 0.99
MIN_COSINE_WITH_FLOAT = 0.95
"""Minimum cosine of networks with float islands. Torch and onnxruntime sum floats in different orders; a difference of
1e-7 rounds one of every few thousand values differently, and later layers spread it. Each single layer must still agree
as in other networks."""

LAYER_IMAGES = 8
"""Number of images for the comparison of layers; each gives thousands of integers per layer."""
Integers = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerAgreement:
    """Comparison of one layer of file and student for equal integer inputs.

    Args:
        layer: name of the layer.
        operation: kind of the operation.
        bits: bit width of the output.
        elements: number of output integers compared.
        different: number of integers that differ.
        max_difference: maximum difference of two integers.
        integer_range: minimum and maximum output integer of the file.
        exact: True if the output is equal on every processor, so that no integer may differ; False for layers that
            round floats or lie near a rounding tie (:func:`qface.quantization.binding.layers_near_ties`).
        near_ties: number of integers that differ where the student rounds a float within a thousandth of a step of a
            tie.
    """

    layer: str
    operation: str
    bits: int
    elements: int
    different: int
    max_difference: int
    integer_range: tuple[int, int]
    exact: bool = True
    near_ties: int = 0

    @property
    def agrees(self) -> bool:
        """True if the integers fit into ``bits`` and agree: all if ``exact``, else within the tolerance."""
        allowed = 0 if self.exact else (1 - MIN_EQUAL) * self.elements + self.near_ties
        equal = self.different <= allowed and self.max_difference <= 1
        return equal and self.integer_range[1] - self.integer_range[0] < 1 << self.bits


@dataclass(frozen=True, repr=False)
class Agreement(Result):
    """Result of :func:`verify`.

    Args:
        layers: comparison of each layer with integer outputs; empty for OpenVINO and for files that compute in float.
        images: number of images whose embeddings were compared.
        mean_cosine: mean cosine between the embeddings of student and file.
        min_cosine: minimum of these cosines.
        float_layers: names of the float islands, which lower the required cosine.
        runtime: runtime of the file, a :data:`qface.choices.RuntimeName`.
        preprocessing: preprocessing of both and its source, in words.
    """

    layers: tuple[LayerAgreement, ...]
    images: int
    mean_cosine: float
    min_cosine: float
    float_layers: tuple[str, ...] = ()
    runtime: str = "onnxruntime"
    preprocessing: str = ""

    @property
    def agrees(self) -> bool:
        """True if all layers and the embeddings agree."""
        mean, minimum = (
            (MIN_MEAN_COSINE_WITH_FLOAT, MIN_COSINE_WITH_FLOAT) if self.float_layers else (MIN_MEAN_COSINE, MIN_COSINE)
        )
        embeddings = self.mean_cosine >= mean and self.min_cosine >= minimum
        return embeddings and all(layer.agrees for layer in self.layers)

    def _key_figures(self) -> Mapping[str, object]:
        return {
            "agrees": self.agrees,
            "images": self.images,
            "layers": len(self.layers),
            "min_cosine": self.min_cosine,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def verify(
    student: NetworkLike,
    file: str | Path,
    images: Images,
    identities: str | Path | None = None,
    runtime: RuntimeName = "onnxruntime",
) -> Agreement:
    """Compare the outputs of ``student`` in eval mode with those of the file exported from it.

    A file with ``target="cuda"`` runs on a GPU if there is one, all others on the CPU. Does not change ``student``.

    Args:
        student: a calibrated student: a module, the path of its file, or ``package.module:factory``.
        file: path of the ONNX file.
        images: faces; layers are compared on the first eight, embeddings on all.
        identities: identities to use from a folder; None uses all.
        runtime: ``"onnxruntime"``, or ``"openvino"``, which compares embeddings only.

    Returns:
        The comparison of layers and embeddings; its ``agrees`` is the verdict.

    Raises:
        ConfigError: the student is not calibrated, or the runtime is unknown.
        DependencyError: OpenVINO is not installed.
        ExportError: the file was not exported from this network.
        CheckpointError: a file is missing or damaged.
        ImagesError: there are no images, or they cannot be used.

    Example:
        >>> found = qface.verify(student, "student.onnx", "faces/")
        >>> found.images, found.agrees
        (72, True)
    """
    check_choice(RuntimeName, runtime=runtime)
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
    with deployed_on_cpu(without_rounded_activations(student) if in_floats else student) as network:
        return replace(compare_embeddings(network, embedder, batches), runtime=runtime, preprocessing=read)


def compare_integers(
    student: nn.Module, graph: ir.IntegerGraph, embedder: OnnxEmbedder, batches: Iterator[Tensor]
) -> Agreement:
    """Compare ``student`` with an integer file, layer by layer and end to end.

    Args:
        student: calibrated student on any device; it is not changed.
        graph: integer graph of the student, with the file's input type.
        embedder: the file, on the CPU.
        batches: at least one batch, float32 [N, 3, height, width], normalized; layers are compared on the first images
            of the first batch.

    Raises:
        ExportError: the file was not exported from this network.
    """
    first = next(batches)
    layers = compare_layers(student, graph, embedder.path, first[:LAYER_IMAGES])
    islands = tuple(each.name for each in graph.operations if isinstance(each, ir.FloatIslandOp))
    with deployed_on_cpu(student) as network:
        found = compare_embeddings(network, embedder, chain([first], batches))
    return replace(found, layers=layers, float_layers=islands)


def _batches(graph: ir.IntegerGraph, source: ImageSource) -> Iterator[Tensor]:
    """Yield normalized batches for the network of ``graph``; raise if there are no images."""
    batches = source.batches(64)
    first = next(batches, None)
    if first is None:
        raise ImagesError("there are no images to compare; pass at least one")
    for batch in chain([first], batches):
        yield as_model_sees(graph, normalize(batch, graph.preprocessing))


def compare_embeddings(network: nn.Module, embedder: OnnxEmbedder, batches: Iterable[Tensor]) -> Agreement:
    """Compare the embeddings of network and file, without layers.

    Args:
        network: on the CPU, in eval mode.
        embedder: the file.
        batches: float32 [N, 3, height, width], normalized.

    Raises:
        ExportError: the embedding dimensions differ.
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
    """Copy ``student`` to the CPU in eval mode, with rounded parameters and unrounded activations."""
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
    """Round biases and affine parameters, which ``layer`` rounds only with enabled input quantizers."""
    if isinstance(layer, WeightedLayer):
        (quantizer,) = layer.quant_context.inputs
        if layer.bias is not None and quantizer is not None:
            layer.bias.copy_(layer.rounded_bias())
    elif isinstance(layer, QuantizedAffine) and layer.quant_context.rounding:
        weight, step, bias = layer.integers()
        layer.weight.copy_(weight * step)
        layer.bias.copy_(bias * (layer.quant_context.scales()[0] * step))


class _Shift(nn.Module):
    """Subtraction of the offset of an :class:`ImageFakeQuantize`, without rounding."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x - self.offset


def compare_layers(
    student: nn.Module, graph: ir.IntegerGraph, file: str | Path, inputs: Tensor
) -> tuple[LayerAgreement, ...]:
    """Compare each layer of ``file`` with the student's, both fed the student's integers.

    Args:
        student: calibrated student; it is not changed.
        graph: integer graph of the student, with the file's input type.
        file: path of the file exported from it.
        inputs: normalized images, float32 [N, 3, height, width], from
            :func:`qface.deployment.inputs.as_model_sees`.

    Raises:
        ExportError: the file was not exported from this network.
    """
    operations = [operation for operation in graph.operations if _is_rounded(operation)]
    given, ties = _record_integers(student, inputs, {operation.output.name for operation in operations})
    found = _run_layers(Path(file), given, to_file_input(graph, inputs))
    near_ties = layers_near_ties(cast(fx.GraphModule, student))
    return tuple(
        _layer_agreement(operation, given, found, ties, _reads_integers(operation) and operation.name not in near_ties)
        for operation in operations
    )


def _reads_integers(operation: ir.IntegerOp) -> bool:
    """True if the operation rounds no float that another kernel summed."""
    return isinstance(operation, ir.QuantizeImageOp) or all(value.qparams is not None for value in operation.inputs)


_MOVES = (ir.MaxPoolOp, ir.FlattenOp, ir.MoveOp, ir.PadOp)


def _is_rounded(operation: ir.IntegerOp) -> bool:
    """True if the operation has its own output quantizer."""
    return operation.output.qparams is not None and not isinstance(operation, _MOVES)


def _record_integers(
    student: nn.Module, inputs: Tensor, values: set[str]
) -> tuple[dict[str, Integers], dict[str, npt.NDArray[np.bool_]]]:
    """Record the output integers of each activation quantizer, and which lie near ties, by the name in ``values``."""
    with deployed_on_cpu(student) as network, torch.no_grad():
        recorder = _Recorder(network, values)
        recorder.run(inputs)
    return recorder.integers, recorder.ties


class _Recorder(fx.Interpreter):
    def __init__(self, student: nn.Module, values: set[str]) -> None:
        super().__init__(student)
        self.integers: dict[str, Integers] = {}
        self.ties: dict[str, npt.NDArray[np.bool_]] = {}
        self._values = values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(layer, Quantizer):
            scale, zero_point, *_ = layer.qparams()
            name = self._value(n)
            integers = (result / scale).round() + along_channels(zero_point, result)
            self.integers[name] = integers.byte().cpu().numpy()
            (source,) = n.all_input_nodes
            self.ties[name] = ((self.env[source] / scale % 1 - 0.5).abs() < _TIE).cpu().numpy()
        return result

    def _value(self, quantizer: fx.Node) -> str:
        """Return the name of the quantizer or of the nearest node before it that has a value in the graph."""
        node = quantizer
        while value_name(node) not in self._values:
            (node,) = node.all_input_nodes
        return value_name(node)


def _run_layers(file: Path, given: dict[str, Integers], inputs: Tensor) -> dict[str, Integers]:
    """Run ``file`` with the tensors ``given`` fed to their consumers; return what their producers output."""
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


def _layer_agreement(
    operation: ir.IntegerOp,
    given: dict[str, Integers],
    found: dict[str, Integers],
    ties: dict[str, npt.NDArray[np.bool_]],
    exact: bool,
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
        max_difference=int(steps.max()),
        integer_range=(int(found[name].min()), int(found[name].max())),
        exact=exact,
        near_ties=int(np.count_nonzero(steps[ties[name]])),
    )
