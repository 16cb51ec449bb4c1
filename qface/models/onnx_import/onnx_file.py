"""An ONNX file as nodes and constants, all of its floats float32, and the one output that is the embedding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from qface.errors import CheckpointError, QFaceError, UnsupportedLayerError, one_line
from qface.files import check_file
from qface.limits import named
from qface.models.onnx_import.graph_limits import check_external_data, check_graph
from qface.network_output import is_embedding

__all__ = [
    "Array",
    "Node",
    "OnnxFile",
    "check_onnx",
    "choose_embedding",
    "needed_nodes",
    "read_onnx",
    "read_proto",
    "telling_damage",
]

_LOGGER = logging.getLogger("qface")

Array = npt.NDArray[Any]
Dimensions = Sequence[Any]

_OLDEST_OPSET = 7  # before it, a broadcast was an attribute
_OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Node:
    """An ONNX node, with its attributes as Python values.

    Args:
        op: the operator, after its domain where that is not ONNX's own.
        name: as in the file, or that of the first output.
        inputs: names of values; empty where one is left out.
        outputs: likewise.
        attributes: by name.
        proto: the node as it lies in the file.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Node:
        """``node`` without its empty last inputs."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        inputs = list(node.input)
        while inputs and not inputs[-1]:
            inputs.pop()
        name = node.name or next((each for each in node.output if each), node.op_type)
        return cls(op, name, tuple(inputs), tuple(node.output), attributes, node)

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute ``name``; strings as ``str``."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, position: int) -> bool:
        """True if input ``position`` is given."""
        return position < len(self.inputs) and bool(self.inputs[position])


@dataclass(frozen=True)
class OnnxFile:
    """A graph of one image input, in float32.

    Args:
        path: of the file, for messages.
        model: with all floats as float32.
        is_converted: True if the file has other floats.
        opset: of ONNX's own operators.
        nodes: those that the embedding needs, in the order of the file.
        constants: initializers by name.
        image: the input.
        image_type: of its elements in the file, as ``onnx.TensorProto`` counts types.
        output: name of the embedding.
    """

    path: Path
    model: onnx.ModelProto
    is_converted: bool
    opset: int
    nodes: tuple[Node, ...]
    constants: dict[str, Array]
    image: onnx.ValueInfoProto
    image_type: int
    output: str

    def check_importable(self) -> None:
        """Make sure that this is a float network of an opset that is known.

        Raises:
            UnsupportedLayerError: it is quantized, or older than opset 7.
        """
        if self.opset < _OLDEST_OPSET:
            raise UnsupportedLayerError(
                f"{self.path} has opset {self.opset}, and the oldest that can be imported is {_OLDEST_OPSET}; raise it "
                "with onnx.version_converter.convert_version"
            )
        quantized = [node.name for node in self.nodes if node.op.rpartition(".")[2] in _QUANTIZED]
        if quantized:
            raise UnsupportedLayerError(
                f"{self.path} is quantized already (node {quantized[0]}); give the file of the network that it was "
                "made of"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    def refusal(self, node: Node, what: str) -> UnsupportedLayerError:
        """The error for a node that has ``what``."""
        return UnsupportedLayerError(f"{self.path}: {node.op} {node.name} has {what}, which cannot be imported")


def read_onnx(path: str | Path) -> OnnxFile:
    """Read the file at ``path``, with its external data.

    Raises:
        CheckpointError: it is missing or damaged, or is no network with one image input.
        LimitError: it asks for more than :mod:`qface.limits` allows.
        UnsupportedLayerError: no output may be the embedding, or several may.
    """
    path = Path(path)
    model = check_onnx(path)
    with telling_damage(path):
        check_external_data(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        return _understood(model, path)


@contextmanager
def telling_damage(path: str | Path, where: Callable[[], str] = str) -> Iterator[None]:
    """Turn whatever a damaged graph raises into one error.

    Args:
        path: of the file.
        where: what is at work, for the message.

    Raises:
        CheckpointError: for an error that is none of qface's.
    """
    try:
        with named(path):
            yield
    except QFaceError:
        raise
    except Exception as error:  # no part of a damaged graph has the type or shape that ONNX promises
        place = f" at {where()}" if where() else ""
        raise CheckpointError(
            f"{path} is damaged{place}: {type(error).__name__}: {one_line(error, 200)}; export it again"
        ) from error


def check_onnx(path: Path) -> onnx.ModelProto:
    """The model at ``path`` without its external data, of which no operator has run.

    Raises:
        CheckpointError: it is missing or damaged.
        LimitError: it asks for more than :mod:`qface.limits` allows.
    """
    model = read_proto(path)
    with telling_damage(path):
        check_graph(model, path)
    return model


def _understood(model: onnx.ModelProto, path: Path) -> OnnxFile:
    if model.functions:
        model = inliner.inline_local_functions(model)
    image = _image(model.graph, path)
    image_type = image.type.tensor_type.elem_type
    is_converted = _to_float32(model)
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    output = choose_embedding(*_outputs(model), path)
    nodes = needed_nodes([Node.of(node) for node in model.graph.node], output)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    return OnnxFile(path, model, is_converted, opset, nodes, constants, image, image_type, output)


def read_proto(path: str | Path) -> onnx.ModelProto:
    """The model at ``path`` as it lies in the file; weights in files of their own stay there.

    Raises:
        CheckpointError: it is missing or damaged, or no ONNX file.
    """
    check_file(path)
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors, which differ between its versions
        if Path(path).suffix.lower() != ".onnx":
            raise CheckpointError(
                f"{path} is no ONNX file; give one that qface export makes, or that is published as ONNX"
            ) from error
        raise CheckpointError(f"{path} is no complete ONNX file ({one_line(error, 200)}); fetch it again") from error


def _image(graph: onnx.GraphProto, path: Path) -> onnx.ValueInfoProto:
    constants = {each.name for each in graph.initializer}
    images = [each for each in graph.input if each.name not in constants]
    if len(images) != 1:
        names = ", ".join(each.name for each in images) or "none"
        raise CheckpointError(f"{path} has {len(images)} inputs ({names}); a face network has one, the images")
    image: onnx.ValueInfoProto = images[0]
    return image


def _outputs(model: onnx.ModelProto) -> tuple[list[str], list[Dimensions | None]]:
    """Names and shapes of the outputs; None where a shape is not known."""
    outputs = model.graph.output
    if len(outputs) > 1 and any(_dimensions(each) is None for each in outputs):
        try:
            outputs = onnx.shape_inference.infer_shapes(model).graph.output
        except Exception:  # a model of more than 2 GB, or one that does not fit together, which is told later
            outputs = model.graph.output
    return [each.name for each in outputs], [_dimensions(each) for each in outputs]


def _dimensions(value: onnx.ValueInfoProto) -> list[Any] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [each.dim_value or each.dim_param or None for each in value.type.tensor_type.shape.dim]


def choose_embedding(names: Sequence[str], shapes: Sequence[Dimensions | None], path: Path) -> str:
    """The one output [N, D], or [N, D, 1, 1]; a score or norm beside it is [N, 1].

    Raises:
        UnsupportedLayerError: several may be it, or none.
    """
    if len(names) == 1:
        return names[0]
    usable = [(name, shape) for name, shape in zip(names, shapes, strict=True) if shape is None or is_embedding(shape)]
    # Maps of one pixel are what rows are often made of.
    rows = [name for name, shape in usable if shape is None or len(shape) == 2] or [name for name, _ in usable]
    if len(rows) == 1:
        shape = shapes[list(names).index(rows[0])]
        _LOGGER.warning("%s has %d outputs; %s %s is the embedding", path, len(names), rows[0], _written(shape))
        return rows[0]
    found = "several of its outputs" if rows else "none of its outputs"
    written = ", ".join(f"{name} {_written(shape)}" for name, shape in zip(names, shapes, strict=True))
    raise UnsupportedLayerError(
        f"{path}: {found} can be the embedding [N, D] ({written}); write a file with that one alone: "
        "onnx.utils.extract_model(path, new_path, [input], [output])"
    )


def _written(shape: Dimensions | None) -> str:
    if shape is None:
        return "[?]"
    return f"[{', '.join(str(size) if isinstance(size, int) else 'N' for size in shape)}]"


def needed_nodes(nodes: Sequence[Node], output: str, start: str = "") -> tuple[Node, ...]:
    """Those that ``output`` depends on, in their order; what makes the value ``start`` is left out."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(name for name in _read_by(node.proto) if name != start)
            kept.append(node)
    return tuple(reversed(kept))


def _read_by(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node reads, those in the bodies of a loop or branch included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


# ---- float32


def _to_float32(model: onnx.ModelProto) -> bool:
    """Let every float of another type be float32, in place; True if there was one."""
    graph = model.graph
    changed = [_tensor_to_float32(tensor) for tensor in graph.initializer]
    for value in (*graph.input, *graph.output, *graph.value_info):
        changed.append(_type_to_float32(value))
    for node in graph.node:
        changed.extend(_attribute_to_float32(node, attribute) for attribute in node.attribute)
    return any(changed)


def _tensor_to_float32(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in _OTHER_FLOATS:
        return False
    values = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return True


def _type_to_float32(value: onnx.ValueInfoProto) -> bool:
    if value.type.tensor_type.elem_type not in _OTHER_FLOATS:
        return False
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    return True


def _attribute_to_float32(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> bool:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _tensor_to_float32(attribute.t)
    if (node.op_type, attribute.name) == ("Cast", "to") and attribute.i in _OTHER_FLOATS:
        attribute.i = TensorProto.FLOAT
        return True
    return False
