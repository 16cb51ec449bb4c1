"""The roles of the tensors of an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

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
"""Kinds of the tensors that operators read, by position."""
_COMBINING = frozenset({"BitwiseOr", "BitwiseXor", "Concat", "Mul"})
"""Operators that make one tensor of several; of all others the first input is the data."""


class _Use(NamedTuple):
    """A value that a tensor provides: what for, its name, and its elements where the tensor is taken apart."""

    kind: str
    name: str
    length: int | None


class TensorRoles:
    """The role of each initializer, by the operators that read it, directly or unpacked by constant nodes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
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
            return [SizeEntry(tensor.name, kind, size, elements, _bits_of(tensor, kind, size, elements))]
        # Fewer than eight numbers in a plane would be ambiguous; no network's weights are that few.
        bits = 8 * size // max(sum(lengths), 1)
        shares = shares_of(size, lengths)
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
        """The role of a convolution's weights: a depthwise 1x1 is how PReLUs and BatchNorms are written.

        Slopes share one scale, and may be ones, where a value only changes its scale.
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


def _bits_of(tensor: TensorProto, kind: str, size: int, elements: int) -> int | None:
    """Bits of a number: as they lie there, save for weights in whole bytes: the least that hold all of them."""
    if not elements:
        return None
    if kind == "weight" and tensor.data_type == TensorProto.INT8:
        integers = numpy_helper.to_array(tensor)
        return max(int(integers.max()), -1 - int(integers.min()), 0).bit_length() + 1
    return 8 * size // elements


def shares_of(total: int, lengths: list[int]) -> list[int]:
    """``total`` bytes in proportion to ``lengths``, in whole bytes that add up to it."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [total * end // max(ends[-1], 1) - total * start // max(ends[-1], 1) for start, end in pairwise(ends)]
