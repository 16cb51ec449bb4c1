"""Detection of an ONNX graph's input format, for importing and for running the file.

Many graphs normalize their input: the first operators subtract a mean, divide, swap colors or move channels. This
prefix is run once on random pixels. If it computes one scale and shift per channel, these tell whether the graph
takes images of 0..255 or 0..1. The choice of operators does not matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from qface.choices import ColorOrder
from qface.errors import CheckpointError
from qface.models.onnx_import.constants import COMPUTED, ConstantFolder
from qface.models.onnx_import.onnx_file import Array, Node, OnnxFile
from qface.preprocessing import (
    CROP_SIZE,
    Preprocessing,
    PreprocessingOverride,
    crop_for,
    overridden,
    warn_of_default,
    written_preprocessing,
)

__all__ = ["ImageInput", "described_input", "find_image_input"]

Three = tuple[float, float, float]

_RGB, _BGR = (0, 1, 2), (2, 1, 0)
_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT8: torch.uint8,
}
_PREFIX = frozenset(
    "Add BatchNormalization Cast Concat Div Dropout Gather Identity Mul Neg Slice Split Squeeze Sub Transpose "
    "Unsqueeze".split()
)
"""Operators that may normalize images, swap colors or move channels."""
_LONGEST_PREFIX = 32  # operators; bounds the time, since each prefix runs from the start; the longest known has 12

_BYTES = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, source="graph")
_UNIT = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3, source="graph")
_DEFAULT = Preprocessing(source="default")


@dataclass(frozen=True)
class ImageInput:
    """Input format of a graph, and the normalization that the graph itself computes.

    The graph consists of a prefix, which computes ``(x - mean) / std`` of its input, and the network after it.

    Attributes:
        dtype: element type of the input.
        channels_last: True if the input is [N, H, W, 3], False if it is [N, 3, H, W].
        mean: mean that the prefix subtracts, per channel in the network's order; 0 if it does not normalize.
        std: standard deviation that the prefix divides by, in the same order; 1 if it does not normalize.
        swaps_colors: True if the prefix reverses the channels before it normalizes.
        start: name of the tensor after the prefix, the input of the network.
        starts_channels_last: True if ``start`` is [N, H, W, 3].
        preprocessing: the Preprocessing of the network after the prefix.
    """

    dtype: torch.dtype
    channels_last: bool
    mean: Three
    std: Three
    swaps_colors: bool
    start: str
    starts_channels_last: bool
    preprocessing: Preprocessing

    def to_graph(self, images: Tensor) -> Tensor:
        """Convert float images [N, 3, H, W], normalized by ``preprocessing``, to inputs of the graph."""
        if (self.mean, self.std) != (_ZEROS, _ONES):
            mean, std = (torch.tensor(each, dtype=images.dtype).view(1, 3, 1, 1) for each in (self.mean, self.std))
            images = images * std + mean
        if self.swaps_colors:
            images = images.flip(1)
        if self.channels_last:
            images = images.permute(0, 2, 3, 1)
        return images.round().clamp(0, 255).byte() if self.dtype == torch.uint8 else images.to(self.dtype)


_ZEROS: Three = (0.0, 0.0, 0.0)
_ONES: Three = (1.0, 1.0, 1.0)


def described_input(written: Preprocessing, dtype: torch.dtype) -> ImageInput:
    """Return the input format of a file that qface exported, without inspecting its graph.

    Args:
        written: the Preprocessing in the file's metadata.
        dtype: element type of the input: uint8 for RGB images, a float type for normalized images.
    """
    if dtype != torch.uint8:
        return ImageInput(dtype, False, _ZEROS, _ONES, False, "", False, written)
    return ImageInput(dtype, False, written.mean, written.std, written.color == "BGR", "", False, written)


def find_image_input(file: OnnxFile, override: PreprocessingOverride | None = None) -> ImageInput:
    """Detect the input format of a file.

    The Preprocessing is taken from ``override``, the file's metadata, the normalization in the graph, or the default,
    in this order.

    Args:
        file: the file, converted to float32.
        override: the Preprocessing of the graph's input, or some of its fields.

    Raises:
        CheckpointError: the input is not a batch of color images, or its size differs from the Preprocessing's.
        ConfigError: ``override`` has an unknown field or a value out of range.
    """
    dtype, channels_last, size = _declared(file)
    found = _Prefix(file, channels_last, size, dtype).find()
    written = file.metadata.get("preprocessing")
    if written is not None and dtype == torch.uint8 and not override:
        return _of_described_bytes(found, written_preprocessing(written, file.path), file)
    shown = found.range
    if written is not None and dtype != torch.uint8:
        shown = written_preprocessing(written, file.path)
    elif shown.size != size:
        shown = replace(shown, size=size, crop=crop_for(size))
    given = overridden(shown, override)
    _check_size(file, given)
    warn_of_default(given, file.path)
    return replace(found.input, preprocessing=_composed(given, found.input))


def _declared(file: OnnxFile) -> tuple[torch.dtype, bool, tuple[int, int]]:
    """Return dtype, layout and image size of the input; 112 for dynamic sizes."""
    tensor = file.image.type.tensor_type
    sizes = [each.dim_value for each in tensor.shape.dim]
    original = _DTYPES.get(file.image_type)
    if len(sizes) != 4 or original is None or (sizes[1] not in (0, 3) and sizes[3] != 3):
        kind = TensorProto.DataType.Name(file.image_type).lower()
        raise CheckpointError(
            f"{file.path} must have an input [N, 3, height, width] or [N, height, width, 3] of float or uint8, "
            f"got {kind} {sizes} (0 is dynamic); export the recognition network alone"
        )
    channels_last = sizes[3] == 3 and sizes[1] != 3
    height, width = sizes[1:3] if channels_last else sizes[2:]
    return original, channels_last, (height or CROP_SIZE, width or CROP_SIZE)


def _check_size(file: OnnxFile, given: Preprocessing) -> None:
    sizes = [each.dim_value for each in file.image.type.tensor_type.shape.dim]
    declared = sizes[1:3] if sizes[3] == 3 and sizes[1] != 3 else sizes[2:]
    if any(wanted not in (0, side) for wanted, side in zip(declared, given.size, strict=True)):
        raise CheckpointError(
            f"{file.path} has an input of {declared[0]}x{declared[1]}, but the preprocessing resizes to "
            f"{given.size[0]}x{given.size[1]}; set the size of the preprocessing to that of the input"
        )


def _composed(given: Preprocessing, inside: ImageInput) -> Preprocessing:
    """Combine the Preprocessing of the graph's input with the prefix to that of the network after it."""
    if (inside.mean, inside.std, inside.swaps_colors) == (_ZEROS, _ONES, False):
        return given
    order = _BGR if inside.swaps_colors else _RGB
    outer_mean, outer_std = ([values[channel] for channel in order] for values in (given.mean, given.std))
    means = [_snapped(mean + std * inner) for mean, std, inner in zip(outer_mean, outer_std, inside.mean, strict=True)]
    stds = [_snapped(std * inner) for std, inner in zip(outer_std, inside.std, strict=True)]
    swapped: dict[ColorOrder, ColorOrder] = {"RGB": "BGR", "BGR": "RGB"}
    color = swapped[given.color] if inside.swaps_colors else given.color
    return replace(given, color=color, mean=_three(means), std=_three(stds))


def _of_described_bytes(found: _Found, written: Preprocessing, file: OnnxFile) -> ImageInput:
    """Return the format of a uint8 input whose normalization is in the metadata, as qface exports it."""
    _check_size(file, written)
    swaps = written.color == "BGR"
    return replace(found.input, mean=written.mean, std=written.std, swaps_colors=swaps, preprocessing=written)


def _three(values: Sequence[float]) -> Three:
    first, second, third = values
    return first, second, third


def _snapped(value: float) -> float:
    """Return the shortest decimal number that equals ``value`` up to float32 rounding, else ``value``."""
    for digits in range(7):
        rounded = round(value, digits)
        if abs(rounded - value) <= 4e-7 * max(abs(value), 1e-2):
            return rounded
    return value


# ---- the prefix


@dataclass(frozen=True)
class _Found:
    """The input format that a prefix implies, and the Preprocessing of the graph's input."""

    input: ImageInput
    range: Preprocessing


@dataclass(frozen=True)
class _Map:
    """The map ``(x - mean) / std`` per output channel, with or without reversed channels."""

    mean: Three
    std: Three
    swaps: bool
    channels_last: bool

    @property
    def is_identity(self) -> bool:
        return self.mean == _ZEROS and self.std == _ONES


class _Prefix:
    """The operators at the start of a graph that may normalize its input.

    Args:
        file: the file, converted to float32.
        channels_last: True if the input is [N, H, W, 3].
        size: height and width of the input.
        dtype: element type of the input in the file.
    """

    def __init__(self, file: OnnxFile, channels_last: bool, size: tuple[int, int], dtype: torch.dtype) -> None:
        self._file = file
        self._channels_last = channels_last
        self._size = size
        self._dtype = dtype

    def find(self) -> _Found:
        """Return the longest prefix that normalizes, or else the longest that only swaps or moves channels.

        Prefixes without a BatchNorm have priority, since a BatchNorm after a normalization belongs to the network.
        """
        cuts = list(self._cuts())
        first_norm = next((n for n, (nodes, _) in enumerate(cuts) if nodes[-1].op == "BatchNormalization"), len(cuts))
        maps = [self._map(nodes, value) for nodes, value in cuts]
        names = [value for _, value in cuts]
        for stop in (first_norm, len(cuts)):
            for found, name in reversed(list(zip(maps[:stop], names[:stop], strict=True))):
                shown = None if found is None or found.is_identity else self._range_of(found)
                if found is not None and shown is not None:
                    return self._found(found, name, shown)
        unknown = _BYTES if self._dtype == torch.uint8 else _DEFAULT
        for found, name in reversed(list(zip(maps, names, strict=True))):
            if found is not None and found.is_identity:
                return self._found(found, name, unknown)
        nothing = _Map(_ZEROS, _ONES, False, self._channels_last)
        return self._found(nothing, self._file.image.name, unknown)

    def _found(self, found: _Map, start: str, shown: Preprocessing) -> _Found:
        graph_input = ImageInput(
            self._dtype,
            self._channels_last,
            found.mean,
            found.std,
            found.swaps,
            start,
            found.channels_last,
            shown,
        )
        return _Found(graph_input, shown)

    def _range_of(self, found: _Map) -> Preprocessing | None:
        """Return the Preprocessing of the range, 0..255 or 0..1, that the map brings to about -1..1."""
        if self._dtype == torch.uint8:
            return _BYTES
        is_scale_alone = found.mean == _ZEROS
        if is_scale_alone and all(0.9 < value < 1.1 for value in found.std):
            return None
        kinds = [(0.0, 255.0, _BYTES), (0.0, 1.0, _UNIT)]
        signed = [] if is_scale_alone else [(-1.0, 1.0, None)]
        misfits = [
            (max(_misfit(low, high, mean, std) for mean, std in zip(found.mean, found.std, strict=True)), shown)
            for low, high, shown in (*kinds, *signed)
        ]
        misfit, shown = min(misfits, key=lambda each: each[0])
        return shown if misfit < _MAX_MISFIT else None

    def _cuts(self) -> Iterator[tuple[list[Node], str]]:
        """Yield each prefix after which all nodes depend on the image through one tensor, and its name."""
        constant = self._constant_names()
        readers = [node for node in self._file.nodes if not constant.issuperset(node.outputs)]
        image_nodes = [node for node in readers if node.op not in ("Shape", "Size")]
        last_use = {name: n for n, node in enumerate(image_nodes) for name in node.inputs}
        open_values, taken = {self._file.image.name}, list[Node]()
        for number, node in enumerate(image_nodes):
            if node.op not in _PREFIX or number == _LONGEST_PREFIX:
                return
            taken.append(node)
            open_values.update(name for name in node.outputs if name)
            open_values = {name for name in open_values if last_use.get(name, -1) > number}
            if len(open_values) == 1:
                yield list(taken), next(iter(open_values))

    def _constant_names(self) -> set[str]:
        names = {"", *self._file.constants}
        for node in self._file.nodes:
            if names.issuperset(node.inputs) and node.op in COMPUTED:
                names.update(node.outputs)
        return names

    def _map(self, nodes: Sequence[Node], value: str) -> _Map | None:
        """Return the scale and shift per channel that ``nodes`` compute; None if they compute something else."""
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, *self._size)).astype(np.float64)
        # Negative and small inputs reveal clamps.
        probes = [pixels] if self._dtype == torch.uint8 else [pixels, -pixels, pixels / 255]
        made = [self._run(nodes, value, probe) for probe in probes]
        fits = [_fit(probe, result) for probe, result in zip(probes, made, strict=True) if result is not None]
        if len(fits) < len(probes) or fits[0] is None:
            return None
        agree = all(_same(fits[0], other) for other in fits[1:])
        return fits[0] if agree else None

    def _run(self, nodes: Sequence[Node], value: str, pixels: Array) -> Array | None:
        given = np.moveaxis(pixels, 1, 3) if self._channels_last else pixels
        given = given.astype(np.uint8) if self._dtype == torch.uint8 else given
        folder = ConstantFolder(self._file)  # limits memory and time
        try:
            values = {**self._constants_of(nodes), self._file.image.name: given}
            for proto in [each for node in nodes for each in _in_float64(node, values)]:
                node = Node.of(proto)
                made = folder.evaluate(node, {name: values[name] for name in node.inputs if name})
                values.update(zip((name for name in node.outputs if name), made, strict=True))
        except Exception:  # then it is not a normalization, and the importer reports the node
            return None
        return values[value]

    def _constants_of(self, nodes: Sequence[Node]) -> dict[str, Array]:
        """Return the constant inputs of ``nodes``, with float32 converted to float64."""
        constant, folder = self._constant_names(), ConstantFolder(self._file)
        wanted = {name for node in nodes for name in node.inputs if name in constant and name}
        makers = [node for node in self._file.nodes if constant.issuperset(node.outputs)]
        for node in reversed(makers):
            if wanted.intersection(node.outputs):
                wanted.update(name for name in node.inputs if name)
        known = {name: array for name, array in self._file.constants.items() if name in wanted}
        for node in makers:
            if wanted.intersection(node.outputs):
                made = folder.compute(node, {name: known[name] for name in node.inputs if name})
                known.update(zip((name for name in node.outputs if name), made, strict=True))
        return {name: each.astype(np.float64) if each.dtype == np.float32 else each for name, each in known.items()}


def _in_float64(node: Node, constants: dict[str, Array]) -> list[onnx.NodeProto]:
    """Return nodes that compute ``node`` without rounding to float32.

    A BatchNorm becomes Mul and Add, whose constants are added to ``constants``: the reference evaluator runs the
    BatchNorm of opsets before 14 in training mode.
    """
    if node.op == "Cast" and node.get("to") == TensorProto.FLOAT:
        return [helper.make_node("Cast", list(node.inputs), list(node.outputs), to=TensorProto.DOUBLE)]
    if node.op == "Dropout":
        return [helper.make_node("Identity", [node.inputs[0]], [node.outputs[0]])]
    if node.op != "BatchNormalization":
        return [node.proto]
    weight, bias, mean, variance = (constants[name] for name in node.inputs[1:5])
    factor = weight / np.sqrt(variance + node.get("epsilon", 1e-5))
    names = [f"{node.outputs[0]}/{part}" for part in ("factor", "shift", "product")]
    constants[names[0]], constants[names[1]] = (each.reshape(1, -1, 1, 1) for each in (factor, bias - mean * factor))
    return [
        helper.make_node("Mul", [node.inputs[0], names[0]], [names[2]]),
        helper.make_node("Add", [names[2], names[1]], [node.outputs[0]]),
    ]


_MAX_MISFIT = 6.5  # subtracting only a mean from 0..255 gives 4.9, multiplying 0..1 by 255 gives 5.9


def _misfit(low: float, high: float, mean: float, std: float) -> float:
    """Return the distance of normalized pixels ``low``..``high`` from -1..1, in center and log range."""
    if std <= 0:
        return math.inf
    first, last = (low - mean) / std, (high - mean) / std
    if not first <= 0 <= last:
        return math.inf
    return abs(first + last) / (last - first) + abs(math.log((last - first) / 2))


def _fit(pixels: Array, made: Array) -> _Map | None:
    """Fit scale and shift per channel from ``pixels`` [N, 3, H, W] to ``made``, of either layout."""
    for channels_last, order in itertools.product((False, True), (_RGB, _BGR)):
        images = np.moveaxis(made, 3, 1) if channels_last and made.ndim == 4 else made
        if images.shape != pixels.shape or (channels_last and made.shape[1] == 3):
            continue
        lines = [_line(pixels[:, order[channel]], images[:, channel]) for channel in range(3)]
        if None not in lines:
            found: Any = list(zip(*lines, strict=True))
            return _Map(_three(found[0]), _three(found[1]), order == _BGR, channels_last)
    return None


def _line(x: Array, y: Array) -> tuple[float, float] | None:
    """Fit mean and std of ``y = (x - mean) / std``; None if ``y`` is not such a function with std > 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    x_mean, y_mean = x.mean(), y.mean()
    slope = ((x - x_mean) * (y - y_mean)).sum() / ((x - x_mean) ** 2).sum()
    rest = np.abs(y - y_mean - slope * (x - x_mean)).max()
    if not slope > 0 or not rest <= 1e-5 * max(np.abs(y).max(), slope):
        return None
    return _snapped(float(x_mean - y_mean / slope)), _snapped(float(1 / slope))


def _same(one: _Map | None, other: _Map | None) -> bool:
    if one is None or other is None or (one.swaps, one.channels_last) != (other.swaps, other.channels_last):
        return False
    numbers = (*one.mean, *one.std), (*other.mean, *other.std)
    return bool(np.allclose(*numbers, rtol=1e-4, atol=1e-4))
