"""Read an ONNX file into nodes and float32 constants, and find its input and its embedding output."""

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

_OLDEST_OPSET = 7  # older opsets broadcast by an attribute
_OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Node:
    """An ONNX node with its attributes as Python values.

    Args:
        op: operator name, with the domain as prefix if it is not ONNX's default domain.
        name: name in the file, or of the first output if it has none.
        inputs: names of the input tensors; "" for an omitted optional input.
        outputs: names of the output tensors; "" for an omitted optional output.
        attributes: values by name.
        proto: the node in the file.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Node:
        """Convert ``node`` and drop omitted inputs at the end."""
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        inputs = list(node.input)
        while inputs and not inputs[-1]:
            inputs.pop()
        name = node.name or next((each for each in node.output if each), node.op_type)
        return cls(op, name, tuple(inputs), tuple(node.output), attributes, node)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the attribute ``name``, or ``default`` if it is missing; bytes are decoded to ``str``."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, position: int) -> bool:
        """True if input ``position`` is given."""
        return position < len(self.inputs) and bool(self.inputs[position])


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX graph with one image input, converted to float32.

    Args:
        path: the file, for error messages.
        model: the model, with all float tensors as float32.
        is_converted: True if the file has float tensors of another type.
        opset: opset version of ONNX's default domain.
        nodes: the nodes that the embedding depends on, in the order of the file.
        constants: initializers by name.
        image: the input.
        image_type: element type of the input in the file, a number of ``onnx.TensorProto``.
        output: name of the embedding output.
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
        """Check that the graph is a float network of a supported opset.

        Raises:
            UnsupportedLayerError: the graph is quantized, or its opset is older than 7.
        """
        if self.opset < _OLDEST_OPSET:
            raise UnsupportedLayerError(
                f"{self.path} has opset {self.opset}, but the import needs opset >= {_OLDEST_OPSET}; convert it with "
                "onnx.version_converter.convert_version"
            )
        quantized = [node.name for node in self.nodes if node.op.rpartition(".")[2] in _QUANTIZED]
        if quantized:
            raise UnsupportedLayerError(
                f"{self.path} is quantized already (node {quantized[0]}); give the float model that it was made from"
            )

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file by key."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    def refusal(self, node: Node, what: str) -> UnsupportedLayerError:
        """Return the error for a node of a known operator with the unsupported property ``what``."""
        return UnsupportedLayerError(
            f"{self.path}: {node.op} {node.name} has {what}, which cannot be imported; export the network without it"
        )


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file with its external data.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing or damaged, or has not exactly one input.
        LimitError: the file asks for more memory or operators than :mod:`qface.limits` allows.
        UnsupportedLayerError: no output, or more than one, can be the embedding.
    """
    path = Path(path)
    model = check_onnx(path)
    with telling_damage(path):
        check_external_data(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        return _understood(model, path)


@contextmanager
def telling_damage(path: str | Path, where: Callable[[], str] = str) -> Iterator[None]:
    """Convert any error that a damaged graph causes to a CheckpointError.

    Args:
        path: the file, for the message.
        where: returns the node that is being processed, for the message.

    Raises:
        CheckpointError: the body raised an error other than a QFaceError.
    """
    try:
        with named(path):
            yield
    except QFaceError:
        raise
    except Exception as error:  # any part of a damaged graph may have a wrong type or shape
        place = f" at {where()}" if where() else ""
        raise CheckpointError(
            f"{path} is damaged{place}: {type(error).__name__}: {one_line(error, 200)}; export it again"
        ) from error


def check_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX model without external data and check its graph, without running an operator.

    Raises:
        CheckpointError: the file is missing or damaged.
        LimitError: the file asks for more memory or operators than :mod:`qface.limits` allows.
    """
    model = read_proto(path)
    if not model.graph.output:
        raise CheckpointError(f"{path} is not a complete ONNX file: it has no output; export the network again")
    for value in (*model.graph.input, *model.graph.output):
        _clear_negative_sizes(value)
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
    """Read an ONNX model unchanged and without external data.

    Raises:
        CheckpointError: the file is missing or damaged, or is not an ONNX file.
    """
    check_file(path)
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors differ between its versions
        if Path(path).suffix.lower() != ".onnx":
            raise CheckpointError(
                f"{path} is not an ONNX file; give an .onnx file, for example one that qface export writes"
            ) from error
        raise CheckpointError(
            f"{path} is not a complete ONNX file ({one_line(error, 200)}); download or export it again"
        ) from error


def _image(graph: onnx.GraphProto, path: Path) -> onnx.ValueInfoProto:
    constants = {each.name for each in graph.initializer}
    images = [each for each in graph.input if each.name not in constants]
    if len(images) != 1:
        names = ", ".join(each.name for each in images) or "none"
        raise CheckpointError(
            f"{path} must have one input, the images, but has {len(images)} inputs ({names}); cut the network out "
            "with onnx.utils.extract_model"
        )
    image: onnx.ValueInfoProto = images[0]
    return image


def _outputs(model: onnx.ModelProto) -> tuple[list[str], list[Dimensions | None]]:
    """Return the names and shapes of the outputs; an unknown shape is None."""
    outputs = model.graph.output
    if len(outputs) > 1 and any(_dimensions(each) is None for each in outputs):
        try:
            outputs = onnx.shape_inference.infer_shapes(model).graph.output
        except Exception:  # a model > 2 GB, or an inconsistent one, which a later step reports
            outputs = model.graph.output
    return [each.name for each in outputs], [_dimensions(each) for each in outputs]


def _clear_negative_sizes(value: onnx.ValueInfoProto) -> None:
    """Make negative sizes of a shape dynamic: some converters write -1 for a dynamic size, as onnxruntime reads it."""
    for dimension in value.type.tensor_type.shape.dim:
        if dimension.dim_value < 0:
            dimension.ClearField("dim_value")


def _dimensions(value: onnx.ValueInfoProto) -> list[Any] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [each.dim_value or each.dim_param or None for each in value.type.tensor_type.shape.dim]


def choose_embedding(names: Sequence[str], shapes: Sequence[Dimensions | None], path: Path) -> str:
    """Return the name of the only output [N, D] or [N, D, 1, 1], D > 1; a score or norm [N, 1] is ignored.

    An output of unknown shape (None) may be the embedding.

    Raises:
        UnsupportedLayerError: no output, or more than one, can be the embedding.
    """
    if len(names) == 1:
        return names[0]
    usable = [(name, shape) for name, shape in zip(names, shapes, strict=True) if shape is None or is_embedding(shape)]
    # A network often has [N, D, 1, 1] as the input of its output [N, D].
    rows = [name for name, shape in usable if shape is None or len(shape) == 2] or [name for name, _ in usable]
    if len(rows) == 1:
        shape = shapes[list(names).index(rows[0])]
        _LOGGER.warning("%s has %d outputs; %s %s is the embedding", path, len(names), rows[0], _written(shape))
        return rows[0]
    found = "several of its outputs" if rows else "none of its outputs"
    written = ", ".join(f"{name} {_written(shape)}" for name, shape in zip(names, shapes, strict=True))
    raise UnsupportedLayerError(
        f"{path}: {found} can be the embedding [N, D] ({written}); write a file with only this output: "
        "onnx.utils.extract_model(path, new_path, [input], [output])"
    )


def _written(shape: Dimensions | None) -> str:
    if shape is None:
        return "[?]"
    return f"[{', '.join(str(size) if isinstance(size, int) else 'N' for size in shape)}]"


def needed_nodes(nodes: Sequence[Node], output: str, start: str = "") -> tuple[Node, ...]:
    """Return the nodes that ``output`` depends on, in order, without those that only compute ``start``."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(name for name in _read_by(node.proto) if name != start)
            kept.append(node)
    return tuple(reversed(kept))


def _read_by(node: onnx.NodeProto) -> Iterable[str]:
    """Yield the names of a node's inputs and of the inputs of nodes in its subgraphs."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


# ---- float32


def _to_float32(model: onnx.ModelProto) -> bool:
    """Convert all float tensors to float32 in place; True if any had another type."""
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
