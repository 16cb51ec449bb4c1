"""Roles of the initializers of an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from qface.deployment.size.report import KINDS, SizeEntry

__all__ = ["TensorRoles", "shares_of"]

_ROLES: dict[str, dict[int, str]] = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "QuantizeLinear": {1: "scale", 2: "zero_point"},
    "DequantizeLinear": {1: "scale", 2: "zero_point"},
    "PRelu": {1: "slope"},
    "BatchNormalization": {1: "affine", 2: "affine", 3: "affine", 4: "affine"},
    "LayerNormalization": {1: "affine", 2: "affine"},
    "InstanceNormalization": {1: "affine", 2: "affine"},
}
"""Kinds of operator inputs, by position."""
_COMBINING = frozenset({"BitwiseOr", "BitwiseXor", "Concat", "Mul"})
"""Operators that combine several tensors; the first input of any other operator is its data."""


class _Use(NamedTuple):
    """A constant unpacked from an initializer; ``length`` is its elements if there are several."""

    kind: str
    name: str
    length: int | None


class TensorRoles:
    """Role of each initializer, from the operators that consume it directly or unpacked.

    Args:
        graph: the graph of the file.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._constant = set(self._tensors)
        self._unpacked: dict[str, tuple[onnx.NodeProto, int]] = {}  # constants computed by nodes, without cycles
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
        """Return the entries of an initializer: one, or one for each tensor packed in it.

        Args:
            tensor: the initializer.
            size: bytes of its data.
        """
        uses = list(self._uses.get(tensor.name, {}).values())
        lengths = [use.length for use in uses if use.length is not None]
        if len(lengths) < len(uses) or not sum(lengths):
            kind = min((use.kind for use in uses), key=KINDS.index, default="constant")
            elements = math.prod(tensor.dims)
            return [SizeEntry(tensor.name, kind, size, elements, _bits_of(tensor, kind, size, elements))]
        # Ambiguous for fewer than eight elements per bit plane; no network has so few weights.
        bits = 8 * size // max(sum(lengths), 1)
        shares = shares_of(size, lengths)
        return [
            SizeEntry(use.name, use.kind, share, length, bits)
            for use, length, share in zip(uses, lengths, shares, strict=True)
        ]

    def _roles(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        """Yield the constant inputs of ``node``, each with its kind."""
        if node.op_type in ("Mul", "Add") and not self._constant.issuperset(node.output):
            yield from ((name, "affine") for name in node.input if name in self._constant)
        if node.op_type == "Add" and self._constant.issuperset(node.output):  # offsets of packed weights
            yield from ((name, "zero_point") for name in node.input[1:] if self._is_int8(name))
        for place, kind in _ROLES.get(node.op_type, {}).items():
            if place < len(node.input) and node.input[place] in self._constant:
                yield node.input[place], self._kind_of_operand(node, kind)

    def _kind_of_operand(self, node: onnx.NodeProto, kind: str) -> str:
        """Return the kind of a weight or bias that export wrote for another layer than a convolution."""
        if kind == "weight":
            return self._weight_kind(node)
        is_shift = kind == "bias" and node.op_type == "Conv" and self._weight_kind(node) == "slope"
        return "zero_point" if is_shift else kind

    def _weight_kind(self, node: onnx.NodeProto) -> str:
        """Return the kind of a convolution's weights.

        Export writes PReLU and BatchNorm as depthwise 1x1 convolutions. Slopes share one scale; slopes of 1 only
        requantize a value.
        """
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), None)
        producer = self._constant_producer(node.input[1])
        if producer is None or len(producer.input) < 2:
            return "weight"
        weight = self._tensors.get(producer.input[0])
        if weight is None or list(weight.dims) != [groups, 1, 1, 1]:
            return "weight"
        if not self._is_scalar(producer.input[1]):
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
        """Record a scale, or the two factors of a product of scales."""
        node = self._constant_producer(value)
        for factor in node.input if node is not None and node.op_type == "Mul" else [value]:
            self._note(factor, "scale")

    def _integers(self, value: str) -> tuple[str, str | None]:
        """Return the integers before dequantization of ``value``, and the scale if a Mul applies it."""
        node = self._constant_producer(value)
        if node is not None and node.op_type == "DequantizeLinear":
            return self._integers(node.input[0])[0], None
        if node is not None and node.op_type in ("Cast", "Pad"):
            return self._integers(node.input[0])
        if node is not None and node.op_type == "Mul" and len(node.input) == 2:
            cast = self._constant_producer(node.input[0])
            if cast is not None and cast.op_type == "Cast":
                return cast.input[0], node.input[1]
        return value, None

    def _constant_producer(self, value: str) -> onnx.NodeProto | None:
        """Return the node that computes ``value`` from constants, if any."""
        return self._unpacked[value][0] if value in self._unpacked else None

    def _sources(self, value: str, length: int | None) -> Iterator[tuple[str, int | None]]:
        """Yield the initializers of ``value``, with its number of elements if they are split."""
        if value in self._tensors:
            yield value, length
        elif value in self._unpacked:
            node, place = self._unpacked[value]
            for source in self._data_inputs(node):
                yield from self._sources(source, length if length is not None else self._length(node, place))

    def _data_inputs(self, node: onnx.NodeProto) -> list[str]:
        if node.op_type not in _COMBINING:
            return list(node.input[:1])
        # A scalar is a parameter of the operation, not data.
        return [name for name in node.input if not self._is_scalar(name)] or list(node.input)

    def _is_int8(self, name: str) -> bool:
        return name in self._tensors and self._tensors[name].data_type == TensorProto.INT8

    def _is_scalar(self, name: str) -> bool:
        return name in self._tensors and math.prod(self._tensors[name].dims) == 1

    def _length(self, node: onnx.NodeProto, place: int) -> int | None:
        """Return the number of elements of an output of a Split or Reshape, if constant."""
        if node.op_type not in ("Split", "Reshape") or len(node.input) < 2 or node.input[1] not in self._tensors:
            return None
        sizes = [int(size) for size in numpy_helper.to_array(self._tensors[node.input[1]]).reshape(-1)]
        if node.op_type == "Split":
            return sizes[place] if place < len(sizes) and sizes[place] >= 0 else None
        return math.prod(sizes) if min(sizes, default=1) > 0 else None


def _bits_of(tensor: TensorProto, kind: str, size: int, elements: int) -> int | None:
    """Return bits per element as stored; for int8 weights, the minimum bits that hold the values of any channel."""
    if not elements:
        return None
    if kind == "weight" and tensor.data_type == TensorProto.INT8 and tensor.dims:
        return _bits_of_channels(numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1).astype(np.int16))
    return 8 * size // elements


def _bits_of_channels(integers: npt.NDArray[np.int16]) -> int:
    """Return the bits for all channels [C, K], whose integers are multiples of a stride apart from an offset."""
    above = integers - integers.min(1, keepdims=True)
    strides = np.maximum(np.gcd.reduce(above, axis=1), 1)
    return max(int((above.max(1) // strides).max()).bit_length(), 1)


def shares_of(total: int, lengths: list[int]) -> list[int]:
    """Split ``total`` bytes in proportion to ``lengths``, as integers that add up to it.

    Args:
        total: bytes to split.
        lengths: number of elements of each part.
    """
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [total * end // max(ends[-1], 1) - total * start // max(ends[-1], 1) for start, end in pairwise(ends)]
