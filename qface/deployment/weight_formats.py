"""Weight storage in an ONNX file: int8 tensors, or packed bits that standard operators unpack.

The writer adds every weight tensor to a weight format under a name. At the end the format returns the
initializers and nodes that provide int8 tensors of these names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qface.checks import check_choice
from qface.deployment.integer_graph import Weight
from qface.deployment.packing import Place, offset, pack, places

__all__ = ["WEIGHT_FORMATS", "Int8Format", "PackedFormat", "WeightFormat", "make_weight_format"]


class WeightFormat(Protocol):
    """Interface of the ONNX writers to a weight storage."""

    def add(self, name: str, weight: Weight) -> None:
        """Store the integers of ``weight`` under ``name``."""

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """Return initializers and nodes, to be placed before all other nodes."""


class Int8Format:
    """Weight storage with one byte per weight, independent of its bit width."""

    def __init__(self) -> None:
        self._initializers: list[onnx.TensorProto] = []

    def add(self, name: str, weight: Weight) -> None:
        """Store the integers of ``weight`` under ``name``."""
        self._initializers.append(numpy_helper.from_array(weight.integers, name))

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """Return initializers only."""
        return self._initializers, []


class PackedFormat:
    """Weight storage in packed buffers, shared by tensors of equal bits (:mod:`qface.deployment.packing`).

    A dozen nodes unpack a buffer, a Split gives each layer its weights, and an Add its offsets. onnxruntime folds them
    to constants at load time, so they cost nothing at run time. Load time depends on memory traffic rather than
    arithmetic, because onnxruntime copies every intermediate result and keeps it to the end. Hence all nodes work on
    bytes, most of them on single runs, and large networks have several buffers: large results get fresh pages, small
    ones reuse memory.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], list[_NamedWeight]] = defaultdict(list)

    def add(self, name: str, weight: Weight) -> None:
        """Store the integers of ``weight`` under ``name``."""
        self._groups[weight.bits, weight.stride].append((name, weight))

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """Return the planes of each buffer and the nodes that unpack them."""
        unpackers = [
            _Unpacker(_prefix(bits, stride, number), bits, stride, weights)
            for (bits, stride), group in sorted(self._groups.items())
            for number, weights in enumerate(_buffers(group))
        ]
        initializers = [tensor for unpacker in unpackers for tensor in unpacker.initializers]
        return initializers, [node for unpacker in unpackers for node in unpacker.nodes]


_BYTE = 8
_NamedWeight = tuple[str, Weight]
_BUFFER = 1 << 23
"""Maximum number of integers per buffer; a single layer with more gets its own."""


def _prefix(bits: int, stride: int, number: int) -> str:
    """Return the prefix of a buffer's names; ``number`` counts the buffers of equal bits and stride."""
    return f"w{bits}" + ("x2" if stride == 2 else "") + (f".{number}" if number else "")


def _buffers(weights: list[_NamedWeight]) -> list[list[_NamedWeight]]:
    """Split ``weights`` into buffers in order."""
    buffers: list[list[_NamedWeight]] = []
    room = 0
    for weight in weights:
        size = weight[1].integers.size
        if not buffers or size > room:
            buffers.append([])
            room = _BUFFER
        buffers[-1].append(weight)
        room -= size
    return buffers


class _Unpacker:
    """Initializers and nodes that unpack one buffer.

    Bits are moved only by arithmetic that OpenVINO folds to constants. It does not fold shifts, bitwise operators, Mul
    and Div of bytes, or a Mul after a Cast, which it takes for a dequantization. It recomputes unfolded nodes for every
    image, and a matrix product with an unfolded weight is wrong. No result exceeds the range of its type, because there
    onnxruntime wraps and other runtimes saturate.
    """

    def __init__(self, prefix: str, bits: int, stride: int, weights: list[_NamedWeight]) -> None:
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        planes = pack(np.concatenate([weight.codes.reshape(-1) for _, weight in weights]), bits)
        width = bits // len(planes)
        names = [self._constant(f"plane{place * width}", plane) for place, plane in enumerate(planes)]
        runs = [self._run(names, place, bits) for place in places(bits)]
        codes = self._signed(self._node("Concat", runs, axis=0), bits)
        strided = codes if stride == 1 else self._node("Add", [codes, codes])
        self._split(strided, len(runs) * planes.shape[1], weights)

    def _run(self, planes: list[str], place: Place, bits: int) -> str:
        """Unpack the integers of one run, uint8."""
        width = min(bits, _BYTE - place.shift)
        run = self._shifted_right(planes[place.plane], place.shift)
        if place.straddles:
            above = self._lowest(planes[place.plane + 1], bits - width)
            return self._node("Add", [run, self._shifted_left(above, width)])
        return self._lowest(run, width) if place.shift + width < _BYTE else run

    def _lowest(self, integers: str, width: int) -> str:
        """Keep the lowest ``width`` bits."""
        return self._node("Mod", [integers, self._constant(f"mod{1 << width}", np.array([1 << width], np.uint8))])

    def _shifted_right(self, integers: str, shift: int) -> str:
        if not shift:
            return integers
        by = self._constant(f"div{1 << shift}", np.array([1 << shift], np.int32))
        quotient = self._node("Div", [self._node("Cast", [integers], to=TensorProto.INT32), by])
        return self._node("Cast", [quotient], to=TensorProto.UINT8)

    def _shifted_left(self, integers: str, shift: int) -> str:
        for _ in range(shift):
            integers = self._node("Add", [integers, integers])
        return integers

    def _signed(self, runs: str, bits: int) -> str:
        """Cast to int8 and subtract the offset."""
        signed = self._node("Cast", [runs], to=TensorProto.INT8)
        if not offset(bits):
            return signed
        return self._node("Sub", [signed, self._constant("offset", np.array([offset(bits)], np.int8))])

    def _split(self, integers: str, count: int, weights: list[_NamedWeight]) -> None:
        """Split ``count`` integers into the layers' weights and the padding of the last run; add the offsets."""
        # Short names: those of layers would take as many bytes as the offsets.
        parts = {f"{self._prefix}_part{number}": weight.integers.size for number, (_, weight) in enumerate(weights)}
        rest = count - sum(parts.values())
        if rest:
            parts[f"{self._prefix}_rest"] = rest
        lengths = self._constant("sizes", np.array(list(parts.values())))
        self.nodes.append(helper.make_node("Split", [integers, lengths], list(parts), axis=0))
        for number, (part, (name, weight)) in enumerate(zip(parts, weights, strict=False)):
            dims = weight.integers.shape
            shape = self._constant("shape_" + "x".join(map(str, dims)), np.array(dims))
            if weight.offset is None:
                self.nodes.append(helper.make_node("Reshape", [part, shape], [name]))
            else:
                shaped, offset = self._node("Reshape", [part, shape]), self._constant(f"offset{number}", weight.column)
                self.nodes.append(helper.make_node("Add", [shaped, offset], [name]))

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        name = f"{self._prefix}_{name}"
        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{self._prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


WEIGHT_FORMATS: dict[str, type[Int8Format] | type[PackedFormat]] = {"packed": PackedFormat, "int8": Int8Format}
"""Weight formats by name, as in :func:`qface.export`."""


def make_weight_format(name: str) -> WeightFormat:
    """Create an empty weight format.

    Raises:
        ConfigError: the weight format is unknown.
    """
    check_choice(WEIGHT_FORMATS, weight_format=name)
    return WEIGHT_FORMATS[name]()
