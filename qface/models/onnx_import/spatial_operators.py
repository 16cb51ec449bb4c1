"""Conversion rules of ONNX convolutions, pools, padding and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qface.graph.layers import Pad, Permute, Reshape, Slice, UpsampleNearest
from qface.graph.pooling import padding_of_ceil_windows
from qface.models.onnx_import.importer import Importer, Rule
from qface.models.onnx_import.onnx_file import Array, Node

__all__ = ["SPATIAL_RULES"]

aten: Any = torch.ops.aten

Pads = tuple[int, int, int, int]
"""Pixels at the left, right, top and bottom, in the order of ``torch.nn.functional.pad``."""


# ---- windows


def _window(node: Node, name: str, count: int) -> tuple[int, ...]:
    """Return an attribute with one integer per spatial dimension; the default is 1."""
    return tuple(int(each) for each in node.get(name, (1,) * count))


def _pads(run: Importer, node: Node, kernel: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial dimension in pixels."""
    count = len(kernel)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [(0, 0)] * count
    if mode == "NOTSET":
        pads = list(node.get("pads", (0,) * (2 * count)))
        return list(zip(pads[:count], pads[count:], strict=True))
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise run.refuse(node, f"auto_pad {mode}")
    strides, dilations = _window(node, "strides", count), _window(node, "dilations", count)
    return [_same(*each, upper=mode == "SAME_UPPER") for each in zip(size, kernel, strides, dilations, strict=True)]


def _same(size: int, kernel: int, stride: int, dilation: int, upper: bool) -> tuple[int, int]:
    """Return the padding for ``ceil(size / stride)`` outputs; an odd pixel goes to the end if ``upper``."""
    total = max(0, (math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def _is_even(pads: Sequence[tuple[int, int]]) -> bool:
    return all(before == after for before, after in pads)


def _for_torch(pads: Sequence[tuple[int, int]]) -> Pads:
    """Reorder the padding of height and width for torch: last dimension first."""
    (top, bottom), (left, right) = pads
    return left, right, top, bottom


# ---- convolutions


def _conv(run: Importer, node: Node) -> Any:
    weight, bias = run.required(node, 1), run.weights(node, 2)
    x, name, count = run.value(node), run.name_of(node), weight.ndim - 2
    shape = run.sizes(x)
    if count not in (1, 2) or len(shape) != count + 2:
        raise run.refuse(node, f"{count} spatial dimensions")
    pads = _pads(run, node, weight.shape[2:], shape[2:])
    strides, dilations = _window(node, "strides", count), _window(node, "dilations", count)
    if count == 1:  # becomes a 2d convolution over maps of height 1
        x = run.layer(Reshape((-1, shape[1], 1, shape[2])), (x,), f"{name}_map")
        weight, pads = weight.unsqueeze(2), [(0, 0), *pads]
        strides, dilations = (1, *strides), (1, *dilations)
    padding = tuple(before for before, _ in pads)
    if not _is_even(pads):
        x, padding = run.layer(Pad(_for_torch(pads)), (x,), f"{name}_pad"), (0, 0)
    layer = _convolution(weight, bias, strides, padding, dilations, node.get("group", 1))
    made = run.layer(layer, (x,), name)
    if count == 2:
        return made
    _, channels, _, width = run.sizes(made)
    return run.layer(Reshape((-1, channels, width)), (made,), f"{name}_line")


def _convolution(
    weight: Tensor, bias: Tensor | None, strides: Any, padding: Any, dilations: Any, groups: int
) -> nn.Conv2d:
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    layer = nn.Conv2d(inputs, outputs, kernel, strides, padding, dilations, groups, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def _transposed_conv(run: Importer, node: Node) -> Any:
    """Add a float function; asymmetric padding is sliced off its output."""
    weight, shape = run.required(node, 1), run.shape_of(node)
    if weight.ndim != 4:
        raise run.refuse(node, f"{weight.ndim - 2} spatial dimensions")
    strides, dilations = _window(node, "strides", 2), _window(node, "dilations", 2)
    extra = tuple(node.get("output_padding", (0, 0)))
    spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(dilations, weight.shape[2:], strict=True)]
    full = [
        stride * (size - 1) + span + more
        for stride, size, span, more in zip(strides, shape[2:], spans, extra, strict=True)
    ]
    pads = _transposed_pads(node, full, [size * stride for size, stride in zip(shape[2:], strides, strict=True)])
    padding = [min(each) for each in pads]
    bias = run.stored(node, 2) if node.has(2) else None
    arguments = (run.value(node), run.stored(node, 1), bias, strides, padding, extra, node.get("group", 1), dilations)
    made = run.function(aten.conv_transpose2d.input, arguments, {}, run.name_of(node))
    for dim, (before, after), symmetric in zip((2, 3), pads, padding, strict=True):
        size = run.sizes(made)[dim]
        if before != after:
            cut = Slice(dim, before - symmetric, size - (after - symmetric))
            made = run.layer(cut, (made,), f"{run.name_of(node)}_cut")
    return made


def _transposed_pads(node: Node, full: Sequence[int], same: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pixels to remove before and after each spatial dimension."""
    mode, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and mode == "NOTSET":
        pads = node.get("pads", (0, 0, 0, 0))
        return [(pads[0], pads[2]), (pads[1], pads[3])]
    if wanted is None and mode == "VALID":
        return [(0, 0), (0, 0)]
    sizes = same if wanted is None else wanted[-2:]
    totals = [max(0, given - size) for given, size in zip(full, sizes, strict=True)]
    lower = mode != "SAME_UPPER"
    return [(total - total // 2, total // 2) if lower else (total // 2, total - total // 2) for total in totals]


# ---- pools


def _pool_window(run: Importer, node: Node) -> tuple[Any, Any, list[tuple[int, int]]]:
    """Return kernel size, strides and padding."""
    kernel = _window(node, "kernel_shape", 2)
    if len(kernel) != 2:
        raise run.refuse(node, f"{len(kernel)} spatial dimensions")
    return kernel, _window(node, "strides", 2), _pads(run, node, kernel, run.shape_of(node)[2:])


def _max_pool(run: Importer, node: Node) -> Any:
    kernel, strides, pads = _pool_window(run, node)
    x, name, padding = run.value(node), run.name_of(node), (pads[0][0], pads[1][0])
    if not _is_even(pads) or any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        arguments = (x, list(_for_torch(pads)), -math.inf)
        x, padding = run.function(aten.constant_pad_nd.default, arguments, {}, f"{name}_pad"), (0, 0)
    ceil = bool(node.get("ceil_mode", 0))
    layer = nn.MaxPool2d(kernel, strides, padding, _window(node, "dilations", 2), ceil_mode=ceil)
    return run.layer(layer, (x,), name)


def _average_pool(run: Importer, node: Node) -> Any:
    kernel, strides, pads = _pool_window(run, node)
    if set(_window(node, "dilations", 2)) != {1}:
        raise run.refuse(node, f"dilations {node.get('dilations')}")
    ceil, whole = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    x, name, padding = run.value(node), run.name_of(node), (pads[0][0], pads[1][0])
    if _is_even(pads) and all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        if ceil and whole and any(padding):
            sizes = run.sizes(x)[2:]
            counts = nn.functional.avg_pool2d(torch.empty(1, 1, *sizes), kernel, strides, padding, ceil).shape[2:]
            sides = padding_of_ceil_windows(sizes, counts, kernel, strides, padding)
            x, padding, whole = run.layer(Pad(sides), (x,), f"{name}_pad"), (0, 0), False
        return run.layer(nn.AvgPool2d(kernel, strides, padding, ceil, whole), (x,), name)
    if ceil:
        raise run.refuse(node, "ceil_mode=1 with asymmetric padding")
    padded = run.layer(Pad(_for_torch(pads)), (x,), f"{name}_pad")
    made = run.layer(nn.AvgPool2d(kernel, strides), (padded,), name)
    if whole:
        return made
    inside = nn.functional.pad(torch.ones(1, 1, *run.sizes(x)[2:]), _for_torch(pads))
    correction = run.keep(1 / nn.functional.avg_pool2d(inside, kernel, strides), f"{name}_counts")
    return run.function(aten.mul.Tensor, (made, correction), {}, f"{name}_counted")


def _global_pool(kind: str) -> Rule:
    def rule(run: Importer, node: Node) -> Any:
        shape = run.shape_of(node)
        if len(shape) == 4 and kind == "average":
            return run.call(node, nn.AdaptiveAvgPool2d(1))
        if len(shape) == 4:
            return run.call(node, nn.MaxPool2d(shape[2:], shape[2:]))
        target = aten.mean.dim if kind == "average" else aten.amax.default
        axes = list(range(2, len(shape)))
        return run.function(target, (run.value(node), axes, True), {}, run.name_of(node))

    return rule


# ---- padding


def _pad(run: Importer, node: Node) -> Any:
    shape, mode = run.shape_of(node), node.get("mode", "constant")
    pads = _pads_of_dimensions(run, node, len(shape))
    value = float(node.get("value", 0.0)) if run.opset < 11 else _fill(run, node)
    x, name = run.value(node), run.name_of(node)
    if not any(map(any, pads)):
        return x
    if any(pads[0]):
        raise run.refuse(node, "padding of the batch")
    if mode not in _PAD_MODES:
        raise run.refuse(node, f"the mode {mode}")
    on_map = len(shape) == 4 and min(map(min, pads)) >= 0
    if on_map and not any(pads[1]) and mode in ("reflect", "edge"):
        return run.layer(Pad(_for_torch(pads[2:]), _PAD_MODES[mode]), (x,), name)
    if on_map and mode == "constant" and value == 0:
        return run.layer(Pad((*_for_torch(pads[2:]), *pads[1])), (x,), name)
    if mode != "constant":
        raise run.refuse(node, f"the mode {mode} with pads {pads}")
    last_first = [pixels for pair in reversed(pads) for pixels in pair]
    return run.function(aten.constant_pad_nd.default, (x, last_first, value), {}, name)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}  # ONNX to torch


def _pads_of_dimensions(run: Importer, node: Node, rank: int) -> list[tuple[int, int]]:
    pads = run.integers(node, 1, "pads") or []
    axes = run.integers(node, 3) or list(range(rank))
    found = [(0, 0)] * rank
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        found[axis % rank] = (before, after)
    return found


def _fill(run: Importer, node: Node) -> float:
    value = run.array(node, 2)
    return 0.0 if value is None or value.size == 0 else float(value.item())


# ---- other sizes


def _resize(run: Importer, node: Node) -> Any:
    """Add an UpsampleNearest layer for integer factors, else index selections or an interpolation."""
    x, shape, mode = run.value(node), run.shape_of(node), node.get("mode", "nearest")
    scales = _scales(run, node, shape)
    if len(shape) != 4 or scales[:2] != [1.0, 1.0] or node.get("antialias", 0):
        raise run.refuse(node, f"factors {scales} and antialias {node.get('antialias', 0)}")
    after = [math.floor(size * scale + 1e-6) for size, scale in zip(shape[2:], scales[2:], strict=True)]
    if mode == "nearest":
        return _nearest(run, node, x, after, scales[2:])
    return _interpolated(run, node, x, after, mode)


def _scales(run: Importer, node: Node, shape: Sequence[int]) -> list[float]:
    """Return the factors of all dimensions from the scales or the output sizes."""
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise run.refuse(node, f"keep_aspect_ratio_policy {node.get('keep_aspect_ratio_policy')}")
    axes = [axis % len(shape) for axis in node.get("axes", range(len(shape)))]
    given = node.get("scales") if "scales" in node.attributes else _scale_input(run, node)
    if given is None or not len(given):
        sizes = run.integers(node, 3) or []
        given = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        given = [1.0 if axis == 0 else scale for scale, axis in zip(given, axes, strict=True)]
    found = [1.0] * len(shape)
    for axis, scale in zip(axes, given, strict=True):
        found[axis] = float(scale)
    return found


def _scale_input(run: Importer, node: Node) -> Array | None:
    """Return the scales: the second input of Upsample and in opset 10, the third input in newer opsets."""
    return run.array(node, 1 if node.op == "Upsample" or run.opset < 11 else 2)


def _nearest(run: Importer, node: Node, x: fx.Node, after: Sequence[int], scales: Sequence[float]) -> fx.Node:
    name, before = run.name_of(node), run.sizes(x)[2:]
    chosen = [_nearest_indices(run, node, *each) for each in zip(before, after, scales, strict=True)]
    factors = (after[0] // before[0], after[1] // before[1])
    repeats = [
        np.array_equal(indices, np.arange(size).repeat(factor))
        for indices, size, factor in zip(chosen, before, factors, strict=True)
    ]
    if all(repeats):
        return run.layer(UpsampleNearest(factors), (x,), name)
    for dim, indices in zip((2, 3), chosen, strict=True):
        kept = run.keep(torch.from_numpy(indices), f"{name}_indices")
        x = run.function(aten.index_select.default, (x, dim, kept), {}, name)
    return x


def _nearest_indices(run: Importer, node: Node, before: int, after: int, scale: float) -> Array:
    """Return the index of the input pixel for each output pixel."""
    modern = node.op == "Resize" and run.opset >= 11
    transform = node.get("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    places = _places(run, node, transform, before, after, scale)
    rounding = node.get("nearest_mode", "round_prefer_floor") if modern else "floor"
    round_to = _ROUNDING.get(rounding)
    if round_to is None:
        raise run.refuse(node, f"nearest_mode {rounding}")
    return np.clip(round_to(places), 0, before - 1).astype(np.int64)


_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
}


def _places(run: Importer, node: Node, transform: str, before: int, after: int, scale: float) -> Array:
    """Return the input coordinates of the output pixels."""
    pixels = np.arange(after, dtype=np.float32)
    if transform == "asymmetric":
        return pixels / np.float32(scale)
    if transform == "align_corners":
        return pixels * np.float32((before - 1) / max(after - 1, 1))
    if transform == "half_pixel" or (transform == "pytorch_half_pixel" and after > 1):
        return (pixels + np.float32(0.5)) / np.float32(scale) - np.float32(0.5)
    raise run.refuse(node, f"coordinate_transformation_mode {transform}")


def _interpolated(run: Importer, node: Node, x: fx.Node, after: Sequence[int], mode: str) -> fx.Node:
    modern = node.op == "Resize" and run.opset >= 11
    transform = node.get("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    targets = {"linear": aten.upsample_bilinear2d.default, "cubic": aten.upsample_bicubic2d.default}
    known = transform in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if mode not in targets or not known or (mode == "cubic" and abs(node.get("cubic_coeff_a", -0.75) + 0.75) > 1e-6):
        raise run.refuse(node, f"the mode {mode} with {transform}")
    return run.function(targets[mode], (x, list(after), transform == "align_corners"), {}, run.name_of(node))


def _depth_to_space(run: Importer, node: Node) -> Any:
    block, name = node.get("blocksize"), run.name_of(node)
    _, channels, height, width = run.shape_of(node)
    made = channels // block**2
    by_column = node.get("mode", "DCR") == "CRD"
    split = (-1, made, block, block, height, width) if by_column else (-1, block, block, made, height, width)
    dims = (0, 1, 4, 2, 5, 3) if by_column else (0, 3, 4, 1, 5, 2)
    x = run.call(node, Reshape(split), "_blocks")
    x = run.layer(Permute(dims), (x,), name)
    return run.layer(Reshape((-1, made, height * block, width * block)), (x,), f"{name}_map")


def _space_to_depth(run: Importer, node: Node) -> Any:
    block, name = node.get("blocksize"), run.name_of(node)
    _, channels, height, width = run.shape_of(node)
    x = run.call(node, Reshape((-1, channels, height // block, block, width // block, block)), "_blocks")
    x = run.layer(Permute((0, 3, 5, 1, 2, 4)), (x,), name)
    return run.layer(Reshape((-1, channels * block**2, height // block, width // block)), (x,), f"{name}_map")


def _columns_to_image(run: Importer, node: Node) -> Any:
    image, block = (run.integers(node, position) for position in (1, 2))
    if image is None or block is None or len(image) != 2:
        raise run.refuse(node, "a computed shape, or one of other than two dimensions")
    pads = node.get("pads", [0] * 4)
    if list(pads[:2]) != list(pads[2:]):
        raise run.refuse(node, f"the padding {pads}")
    windows = (_window(node, "dilations", 2), list(pads[:2]), _window(node, "strides", 2))
    return run.function(
        aten.col2im.default, (run.value(node), image, block, *map(list, windows)), {}, run.name_of(node)
    )


SPATIAL_RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "Col2Im": _columns_to_image,
    "Conv": _conv,
    "ConvTranspose": _transposed_conv,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": _global_pool("average"),
    "GlobalMaxPool": _global_pool("max"),
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
    "Upsample": _resize,
}
