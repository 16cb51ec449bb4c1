"""How weights lie in an ONNX file: as int8 tensors, or packed to their bits and unpacked by standard operators.

A container takes the integers of every weight under a name and, at the end, gives the initializers and nodes that
provide them under those names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qface.deployment.graph import Int8
from qface.deployment.packing import Plane, pack
from qface.errors import ConfigError

__all__ = ["CONTAINERS", "Int8Container", "PackedContainer", "WeightContainer", "make_container"]


class WeightContainer(Protocol):
    """What the ONNX writer hands its weights to."""

    def add(self, name: str, integers: Int8, bits: int) -> None:
        """Provide ``integers`` as an int8 tensor called ``name``."""

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """Initializers and nodes, which come before all others."""


class Int8Container:
    """One byte an integer, whatever its width."""

    def __init__(self) -> None:
        self._initializers: list[onnx.TensorProto] = []

    def add(self, name: str, integers: Int8, bits: int) -> None:
        """Provide ``integers`` as an int8 tensor called ``name``."""
        self._initializers.append(numpy_helper.from_array(integers, name))

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """Initializers only."""
        return self._initializers, []


class PackedContainer:
    """All weights of one width in one buffer without a wasted bit (:mod:`qface.deployment.packing`).

    A dozen nodes unpack the buffer once, and a Split hands each layer its part. onnxruntime computes all of it when it
    opens the file, so that nothing of it is left at run time.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[tuple[str, Int8]]] = defaultdict(list)

    def add(self, name: str, integers: Int8, bits: int) -> None:
        """Provide ``integers`` as an int8 tensor called ``name``."""
        self._groups[bits].append((name, integers))

    def contents(self) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """A buffer of one to three planes for each width, and the nodes that unpack it."""
        unpackers = [_Unpacker(bits, weights) for bits, weights in sorted(self._groups.items())]
        initializers = [tensor for unpacker in unpackers for tensor in unpacker.initializers]
        return initializers, [node for unpacker in unpackers for node in unpacker.nodes]


class _Unpacker:
    """Initializers and nodes for the weights of one width."""

    def __init__(self, bits: int, weights: list[tuple[str, Int8]]) -> None:
        self.initializers: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = f"w{bits}"
        sizes = [integers.size for _, integers in weights]
        planes = pack(np.concatenate([integers.reshape(-1) for _, integers in weights]), bits)
        unsigned = self._plane(planes[0], sum(sizes))
        for plane in planes[1:]:
            unsigned = self._node("BitwiseOr", [unsigned, self._plane(plane, sum(sizes))], f"or{plane.shift}")
        self._split(self._signed(unsigned, bits), weights, sizes)

    def _plane(self, plane: Plane, count: int) -> str:
        """The bits of one plane, uint8 [count], at their place in the byte."""
        tag = f"plane{plane.shift}"
        data = self._constant(tag, plane.data)
        per_byte = 8 // plane.width
        if per_byte > 1:
            shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(plane.width)
            shifted = self._node("BitShift", [data, self._constant(f"{tag}_shifts", shifts)], f"{tag}_shifted", "RIGHT")
            mask = self._constant(f"{tag}_mask", np.array([(1 << plane.width) - 1], np.uint8))
            masked = self._node("BitwiseAnd", [shifted, mask], f"{tag}_masked")
            data = self._node("Reshape", [masked, self._constant("flat", np.array([-1]))], f"{tag}_flat")
        if per_byte * plane.data.size != count:
            ends = [self._constant(f"{tag}_{end}", np.array([at])) for end, at in (("start", 0), ("end", count))]
            data = self._node("Slice", [data, *ends], f"{tag}_values")
        if plane.shift:
            places = self._constant(f"{tag}_places", np.array([plane.shift], np.uint8))
            data = self._node("BitShift", [data, places], f"{tag}_placed", "LEFT")
        return data

    def _signed(self, unsigned: str, bits: int) -> str:
        """int8: what was stored is greater by half the range."""
        wide = self._node("Cast", [unsigned], "wide", to=TensorProto.INT32)
        half = self._constant("half", np.array([1 << (bits - 1)], np.int32))
        return self._node("Cast", [self._node("Sub", [wide, half], "centred")], "signed", to=TensorProto.INT8)

    def _split(self, signed: str, weights: list[tuple[str, Int8]], sizes: list[int]) -> None:
        parts = [f"{name}_flat" for name, _ in weights]
        lengths = self._constant("sizes", np.array(sizes))
        self.nodes.append(helper.make_node("Split", [signed, lengths], parts, axis=0))
        for (name, integers), part in zip(weights, parts, strict=True):
            shape = self._constant("shape_" + "x".join(map(str, integers.shape)), np.array(integers.shape))
            self.nodes.append(helper.make_node("Reshape", [part, shape], [name]))

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        name = f"{self._prefix}_{name}"
        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, direction: str | None = None, **attributes: Any) -> str:
        output = f"{self._prefix}_{output}"
        extra = {} if direction is None else {"direction": direction}
        self.nodes.append(helper.make_node(kind, inputs, [output], **extra, **attributes))
        return output


CONTAINERS: dict[str, type[Int8Container] | type[PackedContainer]] = {"packed": PackedContainer, "int8": Int8Container}
"""Containers by the name that users type."""


def make_container(name: str) -> WeightContainer:
    """An empty container.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in CONTAINERS:
        raise ConfigError(f"container {name!r} is none of {', '.join(CONTAINERS)}")
    return CONTAINERS[name]()
