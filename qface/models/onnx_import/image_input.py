"""The images that an ONNX graph takes: found once, for everyone who runs such a file or imports it.

Many files normalize inside: their first operators subtract a mean, divide, swap the colors or move the channels. This
prefix is run once on random pixels; where it turns out to be one factor and shift per channel, it tells whether the
file takes bytes or images of 0..1. However it is written makes no difference.
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
"""Operators that normalize images, swap colors and move channels."""
_LONGEST_PREFIX = 32  # operators; each prefix is computed from its start, and the longest known has 12

_BYTES = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, source="graph")
_UNIT = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3, source="graph")
_DEFAULT = Preprocessing(source="default")


@dataclass(frozen=True)
class ImageInput:
    """The images that a graph takes, and the normalization before the network proper.

    Attributes:
        dtype: of the input.
        channels_last: True if the input is [N, height, width, 3].
        mean: per channel in the network's order: the graph computes ``(x - mean) / std`` of its input.
        std: likewise; 0 and 1 where it normalizes nothing.
        swaps_colors: True if it reverses the channels first.
        start: name of the value where the network proper begins.
        starts_channels_last: True if that is [N, height, width, 3].
        preprocessing: what the network proper reads.
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
        """The input of the graph for ``images``, float [N, 3, height, width] as the network proper reads them."""
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
    """The input of a file of ours, which needs no look at its graph: normalized floats, or RGB bytes."""
    if dtype != torch.uint8:
        return ImageInput(dtype, False, _ZEROS, _ONES, False, "", False, written)
    return ImageInput(dtype, False, written.mean, written.std, written.color == "BGR", "", False, written)


def find_image_input(file: OnnxFile, override: PreprocessingOverride | None = None) -> ImageInput:
    """The images that ``file`` takes: as the user says, as its metadata say, as the graph shows, or else the default.

    Args:
        file: with floats as float32.
        override: what goes into the graph, or some fields of that.

    Raises:
        CheckpointError: the input is no batch of color images, or images of another size than it gives.
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
    """Type, layout and size of the input; the size of a crop where the file leaves it open."""
    tensor = file.image.type.tensor_type
    sizes = [each.dim_value for each in tensor.shape.dim]
    original = _DTYPES.get(file.image_type)
    if len(sizes) != 4 or original is None or (sizes[1] not in (0, 3) and sizes[3] != 3):
        kind = TensorProto.DataType.Name(file.image_type).lower()
        raise CheckpointError(
            f"{file.path} reads {kind} {sizes}, and no images [N, 3, height, width] of float or uint8"
        )
    channels_last = sizes[3] == 3 and sizes[1] != 3
    height, width = sizes[1:3] if channels_last else sizes[2:]
    return original, channels_last, (height or CROP_SIZE, width or CROP_SIZE)


def _check_size(file: OnnxFile, given: Preprocessing) -> None:
    sizes = [each.dim_value for each in file.image.type.tensor_type.shape.dim]
    declared = sizes[1:3] if sizes[3] == 3 and sizes[1] != 3 else sizes[2:]
    if any(wanted not in (0, side) for wanted, side in zip(declared, given.size, strict=True)):
        raise CheckpointError(
            f"{file.path} reads images of {declared[0]}x{declared[1]}, but its preprocessing gives "
            f"{given.size[0]}x{given.size[1]}: correct the size"
        )


def _composed(given: Preprocessing, inside: ImageInput) -> Preprocessing:
    """The Preprocessing of the network proper where the graph is given images as ``given`` says."""
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
    """RGB bytes, of which the metadata say how the graph normalizes them, as in files of ours."""
    _check_size(file, written)
    swaps = written.color == "BGR"
    return replace(found.input, mean=written.mean, std=written.std, swaps_colors=swaps, preprocessing=written)


def _three(values: Sequence[float]) -> Three:
    first, second, third = values
    return first, second, third


def _snapped(value: float) -> float:
    """``value``, or a number of few digits that it is within the rounding of float32."""
    for digits in range(7):
        rounded = round(value, digits)
        if abs(rounded - value) <= 4e-7 * max(abs(value), 1e-2):
            return rounded
    return value


# ---- the prefix


@dataclass(frozen=True)
class _Found:
    """The map that a prefix of the graph computes, and the images that it shows to be its input."""

    input: ImageInput
    range: Preprocessing


@dataclass(frozen=True)
class _Map:
    """``(x - mean) / std`` of channels in their order or reversed; by channel of the result."""

    mean: Three
    std: Three
    swaps: bool
    channels_last: bool

    @property
    def is_identity(self) -> bool:
        return self.mean == _ZEROS and self.std == _ONES


class _Prefix:
    """The operators at the start of a graph.

    Args:
        file: with floats as float32.
        channels_last: layout of its input.
        size: height and width.
        dtype: of the input as the file has it.
    """

    def __init__(self, file: OnnxFile, channels_last: bool, size: tuple[int, int], dtype: torch.dtype) -> None:
        self._file = file
        self._channels_last = channels_last
        self._size = size
        self._dtype = dtype

    def find(self) -> _Found:
        """The effect of the longest prefix that normalizes, else of the longest that swaps or moves channels.

        A BatchNorm after a normalization is the network's own.
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
        """The images that a normalization is for: those that it brings to around zero, or to 0..1."""
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
        return shown if misfit < _GREATEST_MISFIT else None

    def _cuts(self) -> Iterator[tuple[list[Node], str]]:
        """Nodes up to a value that everything after them reads the image through, and its name."""
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
        """The factor and shift per channel by which ``nodes`` change pixels, None where they do something else."""
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, *self._size)).astype(np.float64)
        probes = (
            [pixels] if self._dtype == torch.uint8 else [pixels, -pixels, pixels / 255]
        )  # limits show on the others
        made = [self._run(nodes, value, probe) for probe in probes]
        fits = [_fit(probe, result) for probe, result in zip(probes, made, strict=True) if result is not None]
        if len(fits) < len(probes) or fits[0] is None:
            return None
        agree = all(_same(fits[0], other) for other in fits[1:])
        return fits[0] if agree else None

    def _run(self, nodes: Sequence[Node], value: str, pixels: Array) -> Array | None:
        given = np.moveaxis(pixels, 1, 3) if self._channels_last else pixels
        given = given.astype(np.uint8) if self._dtype == torch.uint8 else given
        folder = ConstantFolder(self._file)  # which limits what a file can make it compute
        try:
            values = {**self._constants_of(nodes), self._file.image.name: given}
            for proto in [each for node in nodes for each in _in_float64(node, values)]:
                node = Node.of(proto)
                made = folder.evaluate(node, {name: values[name] for name in node.inputs if name})
                values.update(zip((name for name in node.outputs if name), made, strict=True))
        except Exception:  # of whatever kind; then it is no normalization, and whoever imports the node complains
            return None
        return values[value]

    def _constants_of(self, nodes: Sequence[Node]) -> dict[str, Array]:
        """The constants that ``nodes`` read, in float64."""
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
    """``node`` without what would round; a BatchNorm as a product and a sum, whose constants are added.

    The reference of opsets before 14 takes a BatchNorm for one that is being trained.
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


_GREATEST_MISFIT = 6.5  # a mean alone makes 4.9 of bytes, a factor of 255 alone 5.9 of images of 0..1


def _misfit(low: float, high: float, mean: float, std: float) -> float:
    """The distance from -1..1 of normalized pixels of ``low`` .. ``high``: off center, and too wide or narrow."""
    if std <= 0:
        return math.inf
    first, last = (low - mean) / std, (high - mean) / std
    if not first <= 0 <= last:
        return math.inf
    return abs(first + last) / (last - first) + abs(math.log((last - first) / 2))


def _fit(pixels: Array, made: Array) -> _Map | None:
    """The factor and shift of each channel, from ``pixels`` [N, 3, H, W] to ``made``, of either layout."""
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
    """Mean and std of ``y = (x - mean) / std``; None where the two are not on a line that rises."""
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
