"""The size ledger: what every byte of a model file is spent on.

An ONNX file is read as the protobuf fields that lie on the disk, each with its own tag and length, so that the entries
add up to the file's size to the byte; nothing is the remainder of something else. What a tensor is for follows from the
nodes that read it, through whatever unpacks it. A network or student is counted as its packed file will hold it:

    bytes = sum over weights of ceil(elements x bits / 8)
          + slopes + 4 x (biases + weight scales) + 9 x channels of BatchNorms that do not fold
          + 5 x activation quantizers with a range of their own

That leaves out what only a file has: names, nodes, types and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, numpy_helper
from torch import fx, nn

from qface.errors import CheckpointError, one_line
from qface.models import ChannelAffine, load
from qface.quantization import (
    ImageQuantize,
    LowBitFakeQuantize,
    QuantizationConfig,
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
    is_quantized,
    quantize,
)
from qface.quantization.layers import AFFINE_BITS, SLOPE_BITS, layer_of
from qface.quantization.placement import BIAS_BITS

__all__ = ["KINDS", "SizeEntry", "SizeLedger", "measure_size"]

PARAMETERS = ("weight", "bias", "slope", "affine")
"""What a float network holds too."""
TENSORS = (*PARAMETERS, "scale", "zero_point", "constant")
KINDS = (*TENSORS, "header", "name", "node", "graph", "metadata")
"""Of entries, in the order of reports; a tensor with several uses counts as the first of them.

``header`` is type, shape and framing of the tensors, ``name`` every place that names a value, node or tensor, ``node``
operators with their attributes, ``graph`` the interface and the frame of the graph, ``metadata`` the rest of the model.
"""

_MB, _MIB = 10**6, 2**20


@dataclass(frozen=True)
class SizeEntry:
    """One tensor, or all bytes of a file that serve one purpose.

    Args:
        name: the tensor as the file or network calls it; an operator; a field of the file.
        kind: one of :data:`KINDS`.
        bytes: on the disk, the tensor's data alone.
        elements: numbers of a tensor, else how often the purpose occurs.
        bits: of a number as trained, as far as the source tells; None for what is no tensor.
    """

    name: str
    kind: str
    bytes: int
    elements: int
    bits: int | None = None

    @property
    def packed_bytes(self) -> int:
        """What the numbers take without a wasted bit."""
        return self.bytes if self.bits is None else -(-self.elements * self.bits // 8)

    @property
    def fp32_bytes(self) -> int:
        """What a float network spends on it: four bytes a parameter, nothing on what only integers need."""
        return 4 * self.elements if self.kind in PARAMETERS else 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "packed_bytes": self.packed_bytes, "fp32_bytes": self.fp32_bytes}


@dataclass(frozen=True)
class SizeLedger:
    """Every entry of a file, or of the packed file that a network would become.

    Args:
        source: ``"file"``, counted on the disk, or ``"prediction"``, from a network: tensors only.
        entries: what the bytes are spent on.
    """

    source: str
    entries: tuple[SizeEntry, ...]

    @property
    def bytes(self) -> int:
        """Of all entries; the size of the file where the source is one."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def mb(self) -> float:
        """Megabytes, 10^6 bytes."""
        return self.bytes / _MB

    @property
    def mib(self) -> float:
        """Mebibytes, 2^20 bytes."""
        return self.bytes / _MIB

    @property
    def fp32_bytes(self) -> int:
        """All parameters as float32, BatchNorm folded."""
        return sum(entry.fp32_bytes for entry in self.entries)

    def of_kind(self, kind: str) -> SizeLedger:
        """The entries of one of :data:`KINDS`."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.kind == kind))

    @property
    def kinds(self) -> dict[str, SizeLedger]:
        """A ledger for each kind that occurs, in the order of :data:`KINDS`."""
        ledgers = {kind: self.of_kind(kind) for kind in KINDS}
        return {kind: ledger for kind, ledger in ledgers.items() if ledger.entries}

    def totals(self) -> dict[str, float]:
        """Sums over all entries, in bytes, MB and MiB."""
        return {
            "bytes": self.bytes,
            "mb": self.mb,
            "mib": self.mib,
            "packed_bytes": sum(entry.packed_bytes for entry in self.entries),
            "fp32_bytes": self.fp32_bytes,
            "elements": sum(entry.elements for entry in self.entries),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: totals, totals of each kind, and the entries."""
        return {
            "source": self.source,
            **self.totals(),
            "kinds": {kind: ledger.totals() for kind, ledger in self.kinds.items()},
            "entries": [entry.to_dict() for entry in self.entries],
        }


def measure_size(model_or_file: nn.Module | str | Path, bits: int | QuantizationConfig = 6) -> SizeLedger:
    """What each byte of a file is spent on, or would be.

    Args:
        model_or_file: an ``.onnx`` file, counted to the byte; a student, calibrated or not, counted from its
            quantizers; a float network, counted as its student at ``bits``; or whatever else :func:`qface.load` reads.
        bits: widths of a float network's student, or a config; all others have theirs.

    Raises:
        CheckpointError: the file is missing, damaged, or keeps its weights in other files.
        ConfigError: a width is out of range.
        TraceError: torch.fx cannot trace the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; it is named.
    """
    if isinstance(model_or_file, nn.Module):
        return SizeLedger("prediction", tuple(_network_entries(model_or_file, bits)))
    path = Path(model_or_file)
    if path.suffix == ".onnx":
        data, onnx_model = _read(path)
        try:
            return SizeLedger("file", tuple(_file_entries(data, onnx_model)))
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)}; export it again") from error
    return measure_size(load(model_or_file), bits)


# ---- networks


def _network_entries(model: nn.Module, bits: int | QuantizationConfig) -> Iterator[SizeEntry]:
    student = model if is_quantized(model) else quantize(model, bits)
    assert isinstance(student, fx.GraphModule)
    for node in student.graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            yield from _layer_entries(str(node.target), layer)


def _layer_entries(name: str, layer: nn.Module) -> Iterator[SizeEntry]:
    if isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
        weight = SizeEntry(f"{name}.weight", "weight", 0, layer.weight.numel(), layer.weight_fake_quant.bits)
        yield replace(weight, bytes=weight.packed_bytes)
        if layer.bias is not None:
            yield _words(f"{name}.bias", "bias", layer.bias.numel(), BIAS_BITS)
        yield _words(f"{name}.weight_scale", "scale", len(layer.weight))
    elif isinstance(layer, QuantizedPReLU):
        slopes = layer.weight.numel()
        yield SizeEntry(f"{name}.slope", "slope", slopes, slopes, SLOPE_BITS)
        yield _words(f"{name}.slope_scale", "scale", 1)
    elif isinstance(layer, QuantizedAffine) and layer.neighbours.complete:
        channels = layer.channels
        yield SizeEntry(f"{name}.affine", "affine", channels, channels, AFFINE_BITS)
        yield _words(f"{name}.affine_scale", "scale", channels)
        yield _words(f"{name}.bias", "bias", channels, BIAS_BITS)
    elif isinstance(layer, ChannelAffine):
        yield _words(f"{name}.scale", "affine", layer.weight.numel())
        yield _words(f"{name}.shift", "affine", layer.bias.numel())
    elif isinstance(layer, (ImageQuantize, LowBitFakeQuantize)):
        yield _words(f"{name}.scale", "scale", 1)
        yield SizeEntry(f"{name}.zero_point", "zero_point", 1, 1, 8)


def _words(name: str, kind: str, elements: int, bits: int = 32) -> SizeEntry:
    """A tensor that takes four bytes an element in the file, whatever its width."""
    return SizeEntry(name, kind, 4 * elements, elements, bits)


# ---- files


def _file_entries(data: bytes, model: onnx.ModelProto) -> list[SizeEntry]:
    purposes = _Purposes(model.graph)
    ledger = _Collector()
    nodes, tensors = iter(model.graph.node), iter(model.graph.initializer)
    properties = iter(model.metadata_props)
    for field in _fields(memoryview(data)):
        tag = _tag(onnx.ModelProto, field)
        if tag != "graph":
            ledger.add(f"{tag}[{next(properties).key}]" if tag == "metadata_props" else tag, "metadata", field.size)
            continue
        ledger.add("frame", "graph", field.size - len(field.payload))
        for part in _fields(field.payload):
            tag = _tag(onnx.GraphProto, part)
            if tag == "node":
                ledger.add_node(next(nodes), part)
            elif tag == "initializer":
                ledger.add_tensor(next(tensors), part, purposes)
            else:
                ledger.add(tag, "graph", part.size)
    return ledger.entries()


def _read(path: Path) -> tuple[bytes, onnx.ModelProto]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; pass an ONNX file") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own
        raise CheckpointError(f"{path} is no ONNX file, or damaged; export it again") from error
    if not model.HasField("graph"):
        raise CheckpointError(f"{path} holds no graph, so it is no ONNX model; export it again")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise CheckpointError(f"{path} keeps weights in other files; save it as one file to measure it")
    return data, model


class _Collector:
    """Entries by kind and name, in the order in which they came."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], SizeEntry] = {}

    def entries(self) -> list[SizeEntry]:
        """All of them, ordered by kind."""
        return sorted(self._entries.values(), key=lambda entry: KINDS.index(entry.kind))

    def add(self, name: str, kind: str, size: int) -> None:
        """One more occurrence of what is no tensor."""
        before = self._entries.get((kind, name), SizeEntry(name, kind, 0, 0))
        self._entries[kind, name] = replace(before, bytes=before.bytes + size, elements=before.elements + 1)

    def add_node(self, node: onnx.NodeProto, field: _Field) -> None:
        """A node: its names, and all the rest."""
        names = _size(field.payload, onnx.NodeProto, ("input", "output", "name"))
        self.add(node.op_type, "node", field.size - names)
        self.add(node.op_type, "name", names)

    def add_tensor(self, tensor: TensorProto, field: _Field, purposes: _Purposes) -> None:
        """An initializer: its data, shared out among those that it provides for, its name, and its header."""
        data = sum(len(part.payload) for part in _fields(field.payload) if _tag(TensorProto, part) in _DATA)
        name = _size(field.payload, TensorProto, ("name",))
        parts = purposes.parts(tensor, data)
        for part in parts:
            before = self._entries.get((part.kind, part.name))
            self._entries[part.kind, part.name] = part if before is None else _joined(before, part)
        self.add(parts[0].kind, "header", field.size - data - name)
        self.add(parts[0].kind, "name", name)


_DATA = frozenset({"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"})


def _joined(one: SizeEntry, other: SizeEntry) -> SizeEntry:
    """The same tensor in two planes, each of which holds some bits of every number."""
    return replace(one, bytes=one.bytes + other.bytes, bits=(one.bits or 0) + (other.bits or 0))


# ---- what a tensor is for

_ROLES: dict[str, dict[int, str]] = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "QuantizeLinear": {1: "scale", 2: "zero_point"},
    "DequantizeLinear": {1: "scale", 2: "zero_point"},
    "PRelu": {1: "slope"},
    "BatchNormalization": {1: "affine", 2: "affine", 3: "affine", 4: "affine"},
}
"""Kinds of the tensors that operators read, by position."""
_COMBINING = frozenset({"BitwiseOr", "BitwiseXor", "Concat", "Mul"})
"""Operators that make one tensor of several; of all others the first input is the data."""


class _Use(NamedTuple):
    """A value that a tensor provides: what for, its name, and its elements where the tensor is taken apart."""

    kind: str
    name: str
    length: int | None


class _Purposes:
    """What each initializer is for: the operators that read it, directly or unpacked by constant nodes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constant = set(self._tensors)
        self._unpacked: dict[str, tuple[onnx.NodeProto, int]] = {}  # constants that nodes make, without cycles
        for node in graph.node:
            if node.input and all(name in self._constant for name in node.input if name):
                fresh = {name: (node, place) for place, name in enumerate(node.output) if name not in self._constant}
                self._unpacked.update(fresh)
                self._constant.update(fresh)
        self._uses: dict[str, dict[str, _Use]] = {}
        for node in graph.node:
            for value, kind in self._roles(node):
                self._note(value, kind)

    def parts(self, tensor: TensorProto, size: int) -> list[SizeEntry]:
        """The entries that share the ``size`` bytes of ``tensor``: one, or one for each that it is split into."""
        uses = list(self._uses.get(tensor.name, {}).values())
        lengths = [use.length for use in uses if use.length is not None]
        if len(lengths) < len(uses) or not sum(lengths):
            kind = min((use.kind for use in uses), key=KINDS.index, default="constant")
            elements = math.prod(tensor.dims)
            return [SizeEntry(tensor.name, kind, size, elements, _width(tensor, kind, size, elements))]
        # Fewer than eight numbers in a plane would be ambiguous; no network's weights are that few.
        bits = 8 * size // max(sum(lengths), 1)
        shares = _shares(size, lengths)
        return [
            SizeEntry(use.name, use.kind, share, length, bits)
            for use, length, share in zip(uses, lengths, shares, strict=True)
        ]

    def _roles(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        """The constants that ``node`` reads, each with its kind."""
        if node.op_type in ("Mul", "Add") and not self._constant.issuperset(node.output):
            yield from ((name, "affine") for name in node.input if name in self._constant)
        for place, kind in _ROLES.get(node.op_type, {}).items():
            if place < len(node.input) and node.input[place] in self._constant:
                yield node.input[place], self._depthwise_kind(node) if kind == "weight" else kind

    def _depthwise_kind(self, node: onnx.NodeProto) -> str:
        """What the weights of a convolution are: a depthwise 1x1 is how PReLUs and BatchNorms are written.

        Slopes share one scale, and may be ones, where a value only changes its grid.
        """
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), None)
        maker = self._constant_maker(node.input[1])
        if maker is None or len(maker.input) < 2:
            return "weight"
        weight = self._tensors.get(maker.input[0])
        if weight is None or list(weight.dims) != [groups, 1, 1, 1]:
            return "weight"
        if not self._is_scalar(maker.input[1]):
            return "affine"
        return "constant" if (numpy_helper.to_array(weight) == 1).all() else "slope"

    def _note(self, value: str, kind: str) -> None:
        value, scale = self._integers(value)
        if scale is not None:
            self._note_scale(scale)
        for tensor, length in self._sources(value, None):
            uses = self._uses.setdefault(tensor, {})
            before = uses.setdefault(value, _Use(kind, value, length))
            if KINDS.index(kind) < KINDS.index(before.kind):
                uses[value] = _Use(kind, value, length)

    def _note_scale(self, value: str) -> None:
        """A scale, or two that are multiplied."""
        node = self._constant_maker(value)
        for factor in node.input if node is not None and node.op_type == "Mul" else [value]:
            self._note(factor, "scale")

    def _integers(self, value: str) -> tuple[str, str | None]:
        """The integers that constant nodes make ``value`` of, and the scale where Mul does it; or ``value`` itself."""
        node = self._constant_maker(value)
        if node is not None and node.op_type == "DequantizeLinear":
            return self._integers(node.input[0])[0], None
        if node is not None and node.op_type in ("Cast", "Pad"):
            return self._integers(node.input[0])
        if node is not None and node.op_type == "Mul" and len(node.input) == 2:
            cast = self._constant_maker(node.input[0])
            if cast is not None and cast.op_type == "Cast":
                return cast.input[0], node.input[1]
        return value, None

    def _constant_maker(self, value: str) -> onnx.NodeProto | None:
        """The node that makes ``value`` of constants, if one does."""
        return self._unpacked[value][0] if value in self._unpacked else None

    def _sources(self, value: str, length: int | None) -> Iterator[tuple[str, int | None]]:
        """The initializers that ``value`` is made of, with the elements that it takes of each where they are shared."""
        if value in self._tensors:
            yield value, length
        elif value in self._unpacked:
            node, place = self._unpacked[value]
            for source in self._data_inputs(node):
                yield from self._sources(source, length if length is not None else self._length(node, place))

    def _data_inputs(self, node: onnx.NodeProto) -> list[str]:
        if node.op_type not in _COMBINING:
            return list(node.input[:1])
        # A single number is an operand beside a tensor.
        return [name for name in node.input if not self._is_scalar(name)] or list(node.input)

    def _is_scalar(self, name: str) -> bool:
        return name in self._tensors and math.prod(self._tensors[name].dims) == 1

    def _length(self, node: onnx.NodeProto, place: int) -> int | None:
        """Elements of an output of ``node``, where a Split or Reshape tells."""
        if node.op_type not in ("Split", "Reshape") or len(node.input) < 2 or node.input[1] not in self._tensors:
            return None
        sizes = [int(size) for size in numpy_helper.to_array(self._tensors[node.input[1]]).reshape(-1)]
        if node.op_type == "Split":
            return sizes[place] if place < len(sizes) and sizes[place] >= 0 else None
        return math.prod(sizes) if min(sizes, default=1) > 0 else None


def _width(tensor: TensorProto, kind: str, size: int, elements: int) -> int | None:
    """Bits of a number: as they lie there, save for weights in whole bytes: the least that hold all of them."""
    if not elements:
        return None
    if kind == "weight" and tensor.data_type == TensorProto.INT8:
        integers = numpy_helper.to_array(tensor)
        return max(int(integers.max()), -1 - int(integers.min()), 0).bit_length() + 1
    return 8 * size // elements


def _shares(total: int, lengths: list[int]) -> list[int]:
    """``total`` bytes in proportion to ``lengths``, in whole bytes that add up to it."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [total * end // max(ends[-1], 1) - total * start // max(ends[-1], 1) for start, end in pairwise(ends)]


# ---- protobuf's wire format, https://protobuf.dev/programming-guides/encoding


class _Field(NamedTuple):
    """One field of a message: its number, its value, and its bytes with tag and length."""

    number: int
    payload: memoryview
    size: int


def _fields(data: memoryview) -> Iterator[_Field]:
    """The fields of a serialized message that protobuf could read, one behind the other."""
    position = 0
    while position < len(data):
        key, body = _varint(data, position)
        end = body + _FIXED.get(key & 7, 0)
        if key & 7 == _VARINT:
            _, end = _varint(data, body)
        elif key & 7 == _DELIMITED:
            length, body = _varint(data, body)
            end = body + length
        yield _Field(key >> 3, data[body:end], end - position)
        position = end


_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
"""Bytes of the wire types without a length. Groups, 3 and 4, are tags, between which fields lie as anywhere."""


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the low ones first, and the position behind it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def _tag(message: type[Any], field: _Field) -> str:
    """Name of ``field`` in ``message``."""
    known = message.DESCRIPTOR.fields_by_number.get(field.number)
    return f"field {field.number}" if known is None else str(known.name)


def _size(data: memoryview, message: type[Any], names: tuple[str, ...]) -> int:
    """Bytes that the fields called ``names`` take, tags and lengths included."""
    return sum(field.size for field in _fields(data) if _tag(message, field) in names)
