"""Conversion rules of ATen operators to layers, and a list of those that may remain float functions.

``torch.export`` expresses a network in about a hundred operators, a few dozen of which cover almost everything. A rule
returns the node of the result, a list of nodes, or None if there is no layer for these arguments.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from qface.graph.layers import (
    Add,
    ChannelAffine,
    Concat,
    Maximum,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Slice,
    UpsampleNearest,
)
from qface.graph.pooling import padding_of_ceil_windows

if TYPE_CHECKING:
    from qface.graph.capture import Converter

__all__ = ["FLOAT_FUNCTIONS", "LAYER_RULES", "Call", "Constant", "along_one_dimension", "clamp_layer", "operator_name"]

Shape = tuple[Any, ...]
"""Shape of a tensor; None for a size that depends on the batch size."""

FLOAT_FUNCTIONS = frozenset(
    "__and__ __or__ abs add addmm amax amin arange argmax argmin atan2 avg_pool1d avg_pool3d baddbmm bitwise_and "
    "bitwise_not bitwise_or bmm cat ceil celu chunk clamp clamp_max clamp_min col2im constant_pad_nd conv1d "
    "conv2d conv3d conv_transpose2d cos cumsum div einsum eq erf exp expand expand_as flip floor full full_like "
    "gather ge gelu glu gt im2col index index_select instance_norm isnan layer_norm le linalg_vector_norm linear log "
    "log1p log_sigmoid log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max mean "
    "min minimum mm mul ne new_full new_ones new_zeros norm ones ones_like pad pixel_unshuffle pow prelu prod "
    "reciprocal remainder repeat repeat_interleave reshape roll round rsqrt rsub scaled_dot_product_attention "
    "select selu sigmoid sign sin slice softmax split sqrt square stack std sub sum sym_size tanh tile to unfold "
    "upsample_bicubic2d upsample_bilinear2d upsample_nearest1d upsample_nearest2d var where zeros zeros_like".split()
)
"""Operators that may remain functions: their arguments are tensors and numbers, and they change no argument."""


_WEIGHT = re.compile(r"(^|\.)(weight(_orig|_g|_v)?|parametrizations\.weight\.\w+)$")


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the images, and the name of its parameter or buffer."""

    tensor: Tensor
    name: str


def operator_name(target: Any) -> str:
    """Return an operator's name without overload and in-place suffix: ``add`` for ``aten::add_.Tensor``."""
    schema = target._schema
    name: str = schema.name.removeprefix("aten::")
    return name.removesuffix("_") if schema.is_mutable else name


@dataclass(frozen=True)
class Call:
    """One call of an ATen operator.

    Args:
        node: the node in the exported program.
        name: name of the operator.
        arguments: nodes of the new graph, constants and plain values, by the names in the operator's schema.
        path: path of the calling module if it is a layer of torch.nn or qface, else None.
    """

    node: fx.Node
    name: str
    arguments: dict[str, Any]
    path: str | None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the argument ``name``, or ``default`` if this overload does not have it."""
        return self.arguments.get(name, default)

    @property
    def layer_name(self) -> str:
        """Name for a layer without parameters."""
        return self.path or self.node.name

    @property
    def output(self) -> Shape:
        """Shape of the output."""
        return plain_shape(self.node.meta["val"])

    def shape(self, name: str) -> Shape:
        """Return the shape of the argument ``name``."""
        return shape_of_value(self.arguments[name])


def plain_shape(value: Any) -> Shape:
    """Return the shape of a tensor of the exported program."""
    return tuple(int(size) if isinstance(size, int) else None for size in value.shape)


def shape_of_value(value: Any) -> Shape:
    """Return the shape of a node of the new graph or of a constant; () for other values."""
    if isinstance(value, Constant):
        return tuple(value.tensor.shape)
    return value.meta["shape"] if isinstance(value, fx.Node) and "shape" in value.meta else ()


def _is_tensor(value: Any) -> bool:
    """True if ``value`` is a tensor that depends on the images."""
    return isinstance(value, fx.Node) and "shape" in value.meta


Rule = Callable[["Converter", Call], Any]


# ---- layers with weights


def _parameters(layer: nn.Module, weight: Constant, bias: Constant | None) -> nn.Module:
    layer.register_parameter("weight", as_parameter(weight.tensor))
    layer.register_parameter("bias", None if bias is None else as_parameter(bias.tensor))
    return layer


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """Return ``tensor`` as a parameter, or itself if it is one, to share it with the captured model."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.is_floating_point())


def owner_of(weight: Constant) -> str:
    """Return the name of the layer that owns ``weight``."""
    return _WEIGHT.sub("", weight.name) or "weight"


def _weights_of(call: Call) -> bool:
    return isinstance(call["weight"], Constant) and isinstance(call.get("bias"), (Constant, type(None)))


def _convolution(run: Converter, call: Call) -> Any:
    if not _weights_of(call):
        return None
    weight = call["weight"].tensor
    x, padding = call["input"], call["padding"]
    kernel, dilation = tuple(weight.shape[2:]), _pair(call["dilation"])
    if padding == "same":
        x, padding = _padded_to_same(run, call, kernel, dilation)
    elif padding == "valid":
        padding = (0, 0)
    layer = nn.Conv2d(
        weight.shape[1] * call["groups"],
        weight.shape[0],
        kernel,
        _pair(call["stride"]),
        _pair(padding),
        dilation,
        call["groups"],
        bias=False,
        device="meta",
    )
    return run.layer(_parameters(layer, call["weight"], call.get("bias")), (x,), owner_of(call["weight"]))


def _padded_to_same(run: Converter, call: Call, kernel: Any, dilation: Any) -> tuple[fx.Node, tuple[int, int]]:
    """Return input and padding for padding="same"; asymmetric padding becomes a Pad layer."""
    totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    top, left = (total // 2 for total in totals)
    if not any(total % 2 for total in totals):
        return call["input"], (top, left)
    sides = (left, totals[1] - left, top, totals[0] - top)
    return run.layer(Pad(sides), (call["input"],), f"{owner_of(call['weight'])}_pad"), (0, 0)


def _convolution_1d(run: Converter, call: Call) -> Any:
    """Add a 2d convolution over maps of height 1."""
    if not _weights_of(call) or call["padding"] == "same":
        return None
    weight, name = call["weight"], owner_of(call["weight"])
    channels, width = call.shape("input")[1:]
    padding = 0 if call["padding"] == "valid" else _single(call["padding"])
    layer = nn.Conv2d(
        weight.tensor.shape[1] * call["groups"],
        weight.tensor.shape[0],
        (1, weight.tensor.shape[2]),
        (1, _single(call["stride"])),
        (0, padding),
        (1, _single(call["dilation"])),
        call["groups"],
        bias=False,
        device="meta",
    )
    as_map = Constant(as_parameter(weight.tensor.detach().unsqueeze(2)), weight.name)
    x = run.layer(Reshape((-1, channels, 1, width)), (call["input"],), f"{name}_map")
    y = run.layer(_parameters(layer, as_map, call.get("bias")), (x,), name)
    return run.layer(Reshape((-1, *call.output[1:])), (y,), f"{name}_line")


def _linear(run: Converter, call: Call) -> Any:
    return _linear_layer(run, call["input"], call["weight"], call.get("bias"))


def _linear_layer(run: Converter, x: Any, weight: Any, bias: Any) -> Any:
    if not _is_tensor(x) or not isinstance(weight, Constant) or weight.tensor.ndim != 2:
        return None
    if bias is not None and not (isinstance(bias, Constant) and bias.tensor.shape == weight.tensor.shape[:1]):
        return None
    layer = nn.Linear(weight.tensor.shape[1], weight.tensor.shape[0], bias=False, device="meta")
    return run.layer(_parameters(layer, weight, bias), (x,), owner_of(weight))


def _matrix_product(run: Converter, call: Call) -> Any:
    """Add a linear layer for a product with a constant matrix."""
    left, right = (call[name] for name in call.arguments if name in ("self", "mat2", "other"))
    if not isinstance(right, Constant):
        return None
    return _linear_layer(run, left, Constant(right.tensor.detach().T.contiguous(), right.name), None)


def _biased_matrix_product(run: Converter, call: Call) -> Any:
    right = call["mat2"]
    if not isinstance(right, Constant) or (call["alpha"], call["beta"]) != (1, 1):
        return None
    return _linear_layer(run, call["mat1"], Constant(right.tensor.detach().T.contiguous(), right.name), call["self"])


def _batch_norm(run: Converter, call: Call) -> Any:
    name = next((owner_of(each) for each in (call["weight"], call["running_mean"]) if each is not None), "batch norm")
    name = name.removesuffix(".running_mean")
    mean, variance = call["running_mean"], call["running_var"]
    if mean is None or call["training"]:
        raise run.refusal(
            call.node,
            f"{name!r} is a BatchNorm without running statistics and cannot be quantized; create it with "
            "track_running_stats=True and train it to estimate them",
        )
    kind = nn.BatchNorm2d if len(call.output) == 4 else nn.BatchNorm1d
    layer = kind(len(mean.tensor), call["eps"], call["momentum"], affine=call["weight"] is not None, device="meta")
    if layer.affine:
        bias = call["bias"]
        layer.weight = as_parameter(call["weight"].tensor)
        layer.bias = as_parameter(torch.zeros_like(call["weight"].tensor) if bias is None else bias.tensor)
    layer.register_buffer("running_mean", mean.tensor)
    layer.register_buffer("running_var", variance.tensor)
    layer.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=mean.tensor.device))
    return run.layer(layer, (call["input"],), name)


def _prelu(run: Converter, call: Call) -> Any:
    if not isinstance(call["weight"], Constant):
        return None
    layer = nn.PReLU(call["weight"].tensor.numel(), device="meta")
    layer.weight = as_parameter(call["weight"].tensor)
    return run.layer(layer, (call["self"],), owner_of(call["weight"]))


def _layer_norm(run: Converter, call: Call) -> Any:
    weight = call["weight"]
    if not isinstance(weight, Constant) or call["bias"] is None:
        return None
    layer = nn.LayerNorm(tuple(call["normalized_shape"]), call["eps"], device="meta")
    return run.layer(_parameters(layer, weight, call["bias"]), (call["input"],), owner_of(weight))


def _group_norm(run: Converter, call: Call) -> Any:
    weight = call["weight"]
    if not isinstance(weight, Constant) or call["bias"] is None:
        return None
    layer = nn.GroupNorm(call["num_groups"], len(weight.tensor), call["eps"], device="meta")
    return run.layer(_parameters(layer, weight, call["bias"]), (call["input"],), owner_of(weight))


# ---- sums and products, of tensors and constants


def _add(run: Converter, call: Call) -> Any:
    return _sum(run, call, call["self"], call["other"], call.get("alpha", 1))


def _sub(run: Converter, call: Call) -> Any:
    alpha = call.get("alpha", 1)
    if _is_tensor(call["self"]):
        return _sum(run, call, call["self"], call["other"], -alpha)
    return _affine(run, call, call["other"], scale=-alpha, shift=call["self"])


def _reversed_sub(run: Converter, call: Call) -> Any:
    return _affine(run, call, call["self"], scale=-call.get("alpha", 1), shift=call["other"])


def _sum(run: Converter, call: Call, left: Any, right: Any, alpha: float) -> Any:
    if _is_tensor(left) and _is_tensor(right):
        if not _are_floats(left, right) or not isinstance(alpha, (int, float)):
            return None
        scaled = right if alpha == 1 else _scaled(run, right, alpha, f"{call.layer_name}_scaled")
        return run.layer(Add(), (left, scaled), call.layer_name)
    if _is_tensor(left):
        return _affine(run, call, left, scale=1, shift=_times(right, alpha))
    return _affine(run, call, right, scale=alpha, shift=left)


def _mul(run: Converter, call: Call) -> Any:
    left, right = call["self"], call["other"]
    if _is_tensor(left) and _is_tensor(right):
        return run.layer(Multiply(), (left, right), call.layer_name) if _are_floats(left, right) else None
    if _is_tensor(left):
        return _affine(run, call, left, scale=right, shift=0)
    return _affine(run, call, right, scale=left, shift=0)


def _div(run: Converter, call: Call) -> Any:
    if call.get("rounding_mode") is not None:
        return _rounded_quotient(run, call, call["rounding_mode"])
    if not _is_tensor(call["self"]) or _is_tensor(call["other"]):
        return None
    other = call["other"]
    if isinstance(other, Constant):
        inverse: Any = Constant((1 / other.tensor.detach().double()).to(other.tensor.dtype), other.name)
    elif isinstance(other, (int, float)):
        inverse = 1 / other
    else:
        return None
    return _affine(run, call, call["self"], scale=inverse, shift=0)


def _floor_divide(run: Converter, call: Call) -> Any:
    return _rounded_quotient(run, call, "floor")


def _rounded_quotient(run: Converter, call: Call, mode: str) -> Any:
    """Divide and round in two steps, since torch's ONNX exporter writes a rounding division incorrectly."""
    if mode != "floor":
        raise run.refusal(
            call.node,
            f"{call.node.name!r} divides with rounding_mode={mode!r}, which qface does not support; use 'floor'",
        )
    aten, given = torch.ops.aten, [call["self"], call["other"]]
    inputs = tuple(run.constant(each.tensor, each.name) if isinstance(each, Constant) else each for each in given)
    quotient = run.function(aten.div.Tensor, inputs, {}, f"{call.node.name}_quotient")
    return run.function(aten.floor.default, (quotient,), {}, call.node.name)


def _neg(run: Converter, call: Call) -> Any:
    return _affine(run, call, call["self"], scale=-1, shift=0)


def _are_floats(*values: Any) -> bool:
    """True if all ``values`` are float tensors that depend on the images."""
    return all(_is_tensor(value) and value.meta["float"] for value in values)


def _makes_floats(call: Call) -> bool:
    return bool(call.node.meta["val"].is_floating_point())


def _scaled(run: Converter, x: fx.Node, factor: float, name: str) -> fx.Node:
    layer = ChannelAffine(1)
    layer.weight = nn.Parameter(torch.tensor([float(factor)]).to(run.example_parameter))
    layer.bias = nn.Parameter(torch.zeros(1).to(run.example_parameter))
    return run.with_shape_of(run.layer(layer, (x,), name), x)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, Constant):
        return value if factor == 1 else Constant(value.tensor.detach() * factor, value.name)
    return value * factor if isinstance(value, (int, float)) else value


def _affine(run: Converter, call: Call, x: Any, scale: Any, shift: Any) -> Any:
    """Add ``scale * x + shift`` if both are scalars or vary along the same dimension, else return None."""
    if not _are_floats(x) or not _makes_floats(call):
        return None
    if call.output != x.meta["shape"]:
        return None
    rank = len(x.meta["shape"])
    factor, summand = along_one_dimension(scale, rank), along_one_dimension(shift, rank)
    if factor is None or summand is None:
        return None
    dims = {dim for dim, _ in (factor, summand) if dim is not None}
    if len(dims) > 1 or 0 in dims:
        return None
    channels = max(len(values) for _, values in (factor, summand))
    layer = ChannelAffine(channels, dim=dims.pop() if dims else 1)
    parameter = run.example_parameter
    layer.weight = nn.Parameter(factor[1].to(parameter).expand(channels).clone())
    layer.bias = nn.Parameter(summand[1].to(parameter).expand(channels).clone())
    named = next((value for value in (scale, shift) if isinstance(value, Constant)), None)
    return run.layer(layer, (x,), named.name if named is not None and named.name else call.layer_name)


def along_one_dimension(value: Any, rank: int) -> tuple[int | None, Tensor] | None:
    """Return the only dimension along which a constant varies, and its values along it.

    Args:
        value: a number or :class:`Constant`.
        rank: number of dimensions of the tensor with which ``value`` is broadcast.

    Returns:
        The dimension (None for a scalar) and the values [size of the dimension]; None if ``value`` is not constant or
        varies along several dimensions.
    """
    if isinstance(value, (int, float)):
        return None, torch.tensor([float(value)])
    if not isinstance(value, Constant) or value.tensor.ndim > rank:
        return None
    shape = (1,) * (rank - value.tensor.ndim) + tuple(value.tensor.shape)
    varying = [dim for dim, size in enumerate(shape) if size > 1]
    if len(varying) > 1:
        return None
    return (varying[0] if varying else None), value.tensor.detach().flatten()


# ---- functions of one value


def _simple(make: Callable[[Call], nn.Module]) -> Rule:
    """Return a rule that adds a layer without parameters of the first argument."""

    def rule(run: Converter, call: Call) -> Any:
        x = next(iter(call.arguments.values()))
        return run.layer(make(call), (x,), call.layer_name) if _is_tensor(x) else None

    return rule


def _clamp(run: Converter, call: Call) -> Any:
    low = call.get("min_val", call.get("min"))
    high = call.get("max_val", call.get("max"))
    if not all(isinstance(limit, (int, float, type(None))) for limit in (low, high)):
        return None
    return run.layer(clamp_layer(low, high), (call["self"],), call.layer_name)


def clamp_layer(low: float | None, high: float | None) -> nn.Module:
    """Return the layer that clamps values to ``low``..``high``; None is no limit."""
    if low == 0 and high is None:
        return nn.ReLU()
    if (low, high) == (0, 6):
        return nn.ReLU6()
    return nn.Hardtanh(-math.inf if low is None else low, math.inf if high is None else high)


def _elu(run: Converter, call: Call) -> Any:
    if (call["scale"], call["input_scale"]) != (1, 1):
        return None
    return run.layer(nn.ELU(call["alpha"]), (call["self"],), call.layer_name)


def _dropout(kind: type[nn.Dropout] | type[nn.Dropout2d]) -> Rule:
    """Return the rule of dropout: a module becomes a layer; a function, off in eval mode, is removed."""

    def rule(run: Converter, call: Call) -> Any:
        return run.layer(kind(call["p"]), (call["input"],), call.path) if call.path else call["input"]

    return rule


def _first(run: Converter, call: Call) -> Any:
    """Return the first argument unchanged."""
    return next(iter(call.arguments.values()))


def _cast(run: Converter, call: Call) -> Any:
    """Remove casts between float types, since a captured network computes in the dtype of its weights."""
    x = call["self"]
    kept = _is_tensor(x) and x.meta["float"] and call.node.meta["val"].is_floating_point()
    return x if kept else None


_BROADCASTING = frozenset(("add", "div", "maximum", "mul", "multiply", "sub"))
_EXPANDING = frozenset(("expand", "expand_as"))


def _expand(run: Converter, call: Call) -> Any:
    """Remove an expansion that changes nothing, or whose consumers all broadcast."""
    if not _is_tensor(call["self"]):
        return None
    before, after = call.shape("self"), call.output
    broadcasts = len(before) == len(after) and all(_broadcasts(user, call.node) for user in call.node.users)
    return call["self"] if before == after or broadcasts else None


def _broadcasts(reader: fx.Node, expanded: fx.Node) -> bool:
    """True if ``reader`` broadcasts and its other operand has the shape of ``expanded``."""
    others = [each for each in reader.all_input_nodes if each is not expanded]
    if not isinstance(reader.target, torch._ops.OpOverload) or operator_name(reader.target) not in _BROADCASTING:
        return False
    if len(others) != 1 or _is_expansion(others[0]):
        return False
    return plain_shape(others[0].meta["val"]) == plain_shape(expanded.meta["val"])


def _is_expansion(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and operator_name(node.target) in _EXPANDING


# ---- windows


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (values[0], values[0]) if len(values) == 1 else (int(values[0]), int(values[1]))


def _single(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _max_pool(run: Converter, call: Call) -> Any:
    stride = call["stride"] or call["kernel_size"]
    layer = nn.MaxPool2d(
        _pair(call["kernel_size"]),
        _pair(stride),
        _pair(call["padding"]),
        _pair(call["dilation"]),
        ceil_mode=call["ceil_mode"],
    )
    return run.layer(layer, (call["self"],), call.layer_name)


def _average_pool(run: Converter, call: Call) -> Any:
    kernel, padding = _pair(call["kernel_size"]), _pair(call["padding"])
    stride = _pair(call["stride"] or call["kernel_size"])
    has_divisor = call["divisor_override"] is not None
    counted = call["count_include_pad"] or has_divisor
    x = call["self"]
    if call["ceil_mode"] and any(padding) and counted:  # onnxruntime returns other averages for these
        sizes, counts = (tuple(map(int, shape[2:])) for shape in (call.shape("self"), call.output))
        sides = padding_of_ceil_windows(sizes, counts, kernel, stride, padding, whole=has_divisor)
        x = run.layer(Pad(sides), (x,), f"{call.layer_name}_pad")
        padding, counted = (0, 0), has_divisor
    layer = nn.AvgPool2d(kernel, stride, padding, call["ceil_mode"], counted)
    pooled = run.layer(layer, (x,), call.layer_name)
    if not has_divisor:
        return pooled
    scale = ChannelAffine(1).to(run.example_parameter)
    with torch.no_grad():
        scale.weight.fill_(math.prod(kernel) / call["divisor_override"])
    return run.layer(scale, (pooled,), f"{call.layer_name}_divisor")


def _adaptive_average(run: Converter, call: Call) -> Any:
    before, after = call.shape("self"), call.output
    if len(before) == 4 and after[2:] == (1, 1) and before != after:
        return run.layer(nn.AdaptiveAvgPool2d(1), (call["self"],), call.layer_name)
    if len(before) == 3:
        return _product_with_averages(run, call, call["self"], before[2], after[2])
    pooled = _adaptive_pool(run, call, nn.AvgPool2d, after)
    return _uneven_average(run, call) if pooled is None and len(before) == 4 else pooled


def _product_with_averages(run: Converter, call: Call, x: Any, before: Any, after: int) -> Any:
    """Average windows of the last dimension by a matrix product."""
    if before is None:
        return None
    columns = run.constant(_averaging_matrix(before, after).T.contiguous().to(run.example_parameter), call.layer_name)
    return run.function(torch.ops.aten.matmul.default, (x, columns), {}, call.node.name)


def _uneven_average(run: Converter, call: Call) -> Any:
    """Average windows of different sizes by two matrix products, since ONNX has no such pool."""
    sizes = list(zip(call.shape("self")[2:], call.output[2:], strict=True))
    if any(None in each for each in sizes):
        return None
    rows, columns = (_averaging_matrix(*each).to(run.example_parameter) for each in sizes)
    product, name = torch.ops.aten.matmul.default, call.node.name
    x = run.function(product, (call["self"], run.constant(columns.T.contiguous(), f"{name}_columns")), {}, f"{name}_x")
    return run.function(product, (run.constant(rows, f"{name}_rows"), x), {}, name)


def _averaging_matrix(before: int, after: int) -> Tensor:
    """Return a matrix [after, before] whose rows average the windows of adaptive pooling."""
    matrix = torch.zeros(after, before)
    for row in range(after):
        start, stop = row * before // after, -(-(row + 1) * before // after)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def _adaptive_maximum(run: Converter, call: Call) -> Any:
    """Add a max pool unless the indices of the maxima are used."""
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        return None
    pooled = _adaptive_pool(run, call, nn.MaxPool2d, plain_shape(call.node.meta["val"][0]))
    return None if pooled is None else [pooled, None]


def _adaptive_pool(
    run: Converter, call: Call, kind: type[nn.AvgPool2d] | type[nn.MaxPool2d], after: Shape
) -> fx.Node | None:
    """Add a pool if all windows have the same size and do not overlap, else return None."""
    x, before = call["self"], call.shape("self")
    if (
        len(before) != 4
        or None in before[2:]
        or any(high % low for high, low in zip(before[2:], after[2:], strict=True))
    ):
        return None
    if before == after:
        return cast(fx.Node, x)
    kernel = (before[2] // after[2], before[3] // after[3])
    return run.layer(kind(kernel, kernel), (x,), call.layer_name)


def _mean(run: Converter, call: Call) -> Any:
    return _over_map(run, call, nn.AdaptiveAvgPool2d(1))


def _amax(run: Converter, call: Call) -> Any:
    if len(call.shape("self")) != 4:
        return None
    kernel = call.shape("self")[2:]
    return _over_map(run, call, nn.MaxPool2d(kernel, kernel))


def _over_map(run: Converter, call: Call, pool: nn.Module) -> Any:
    """Add ``pool`` for a reduction over height and width, with a Flatten unless the dimensions are kept."""
    before, dims = call.shape("self"), call.get("dim")
    if len(before) != 4 or not isinstance(dims, (list, tuple)) or {dim % 4 for dim in dims} != {2, 3}:
        return None
    pooled = run.layer(pool, (call["self"],), call.layer_name)
    return pooled if call.get("keepdim") else run.layer(nn.Flatten(1), (pooled,), f"{call.layer_name}_flatten")


# ---- shapes


def _reshape(run: Converter, call: Call) -> Any:
    x = call["self"]
    before, after = shape_of_value(x), call.output
    if before == after:
        return x
    if None not in before or after.count(None) > 1:
        return None
    if len(after) == 2 and len(before) > 2 and before[0] is None and after[0] is None and _rows(before, after):
        return run.layer(nn.Flatten(1), (x,), call.layer_name)
    return run.layer(Reshape(tuple(-1 if size is None else size for size in after)), (x,), call.layer_name)


def _rows(before: Shape, after: Shape) -> bool:
    """True if each image is flattened to one row."""
    return None not in before[1:] and after[1] == math.prod(before[1:])


def _permute(run: Converter, call: Call) -> Any:
    return _permuted(run, call, [dim % len(call.output) for dim in call["dims"]])


def _transpose(run: Converter, call: Call) -> Any:
    dims = list(range(len(call.output)))
    first, second = (call[name] % len(dims) for name in ("dim0", "dim1"))
    dims[first], dims[second] = second, first
    return _permuted(run, call, dims)


def _matrix_transpose(run: Converter, call: Call) -> Any:
    return _permuted(run, call, [1, 0]) if len(call.output) == 2 else None


def _permuted(run: Converter, call: Call, dims: list[int]) -> Any:
    if dims == sorted(dims):
        return call["self"]
    return run.layer(Permute(tuple(dims)), (call["self"],), call.layer_name)


def _slice(run: Converter, call: Call) -> Any:
    dim = call["dim"] % len(call.output)
    start = call.get("start") or 0
    stop, step = call.get("end"), call.get("step", 1)
    if call.shape("self") == call.output:
        return call["self"]
    size = call.shape("self")[dim]
    if size is None or not all(isinstance(each, int) for each in (start, step)):
        return None
    start, stop, step = slice(start, stop, step).indices(size)
    return _part(run, call, dim, start, stop, step)


def _part(run: Converter, call: Call, dim: int, start: int, stop: int, step: int = 1) -> Any:
    if call.shape("self")[dim] is None:
        return None
    return run.layer(Slice(dim, start, stop, step), (call["self"],), call.layer_name)


def _narrow(run: Converter, call: Call) -> Any:
    dim = call["dim"] % len(call.output)
    if not isinstance(call["start"], int) or not isinstance(call["length"], int):
        return None
    return _part(run, call, dim, call["start"], call["start"] + call["length"])


def _select(run: Converter, call: Call) -> Any:
    return _without_dimension(run, call, call["dim"] % len(call.shape("self")), call["index"], call.output)


def _without_dimension(run: Converter, call: Call, dim: int, index: Any, after: Shape) -> Any:
    """Select one index of a dimension and drop the dimension."""
    size = call.shape("self")[dim]
    if size is None or not isinstance(index, int) or after.count(None) != 1:
        return None
    index %= size
    part = run.layer(Slice(dim, index, index + 1), (call["self"],), call.layer_name)
    shape = tuple(-1 if each is None else each for each in after)
    return run.layer(Reshape(shape), (part,), f"{call.layer_name}_reshape")


def _split(run: Converter, call: Call) -> Any:
    """Slice a dimension into parts with the sizes in the exported program."""
    parts = [plain_shape(part) for part in call.node.meta["val"]]
    dim = call.get("dim", 0) % len(parts[0])
    if any(part[dim] is None for part in parts):
        return None
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + part[dim])
    return [_part(run, call, dim, start, stop) for start, stop in itertools.pairwise(bounds)]


def _unbind(run: Converter, call: Call) -> Any:
    parts = [plain_shape(part) for part in call.node.meta["val"]]
    dim = call.get("dim", 0) % len(call.shape("self"))
    made = [_without_dimension(run, call, dim, index, part) for index, part in enumerate(parts)]
    return None if None in made else made


def _concat(run: Converter, call: Call) -> Any:
    tensors = call["tensors"]
    if not _are_floats(*tensors):
        return None
    if len(tensors) == 1:
        return tensors[0]
    return run.layer(Concat(call.get("dim", 0) % len(call.output)), tuple(tensors), call.layer_name)


def _maximum(run: Converter, call: Call) -> Any:
    limited = _limited(run, call, is_low=True)
    if limited is not None:
        return limited
    if not _are_floats(call["self"], call.get("other")):
        return None
    return run.layer(Maximum(), (call["self"], call["other"]), call.layer_name)


def _minimum(run: Converter, call: Call) -> Any:
    return _limited(run, call, is_low=False)


def _limited(run: Converter, call: Call, is_low: bool) -> Any:
    """Add a clamp for the maximum or minimum of a tensor and a constant scalar."""
    for x, limit in itertools.permutations((call["self"], call.get("other"))):
        if (
            _is_tensor(x)
            and isinstance(limit, Constant)
            and limit.tensor.numel() == 1
            and x.meta["shape"] == call.output
        ):
            low, high = (limit.tensor.item(), None) if is_low else (None, limit.tensor.item())
            return run.layer(clamp_layer(low, high), (x,), call.layer_name)
    return None


_PAD_MODES = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}


def _pad(run: Converter, call: Call) -> Any:
    padding = tuple(call.get("pad", call.get("padding")))
    mode = _PAD_MODES.get(call.name, call.get("mode", "constant"))
    if len(call.output) != 4 or not all(isinstance(each, int) and each >= 0 for each in padding):
        return None
    padding = (*padding, *(0,) * (8 - len(padding)))
    if any(padding[6:]) or (any(padding[4:]) and mode != "constant"):
        return None
    if mode not in ("constant", "reflect", "replicate") or (mode == "constant" and call.get("value") not in (None, 0)):
        return None
    if not any(padding):
        return call["self"]
    return run.layer(Pad(padding[:6], mode), (call["self"],), call.layer_name)


def _upsample_nearest(run: Converter, call: Call) -> Any:
    x = next(iter(call.arguments.values()))
    before, after = shape_of_value(x)[2:], call.output[2:]
    if None in (*before, *after) or any(high % low for low, high in zip(before, after, strict=True)):
        return None
    scale = tuple(high // low for low, high in zip(before, after, strict=True))
    return run.layer(UpsampleNearest(scale), (x,), call.layer_name)


def _channel_shuffle(run: Converter, call: Call) -> Any:
    _, channels, *size = call.shape("self")
    groups = call["groups"]
    x = run.layer(Reshape((-1, groups, channels // groups, *size)), (call["self"],), f"{call.layer_name}_groups")
    x = run.layer(Permute((0, 2, 1, *range(3, len(size) + 3))), (x,), call.layer_name)
    return run.layer(Reshape((-1, channels, *size)), (x,), f"{call.layer_name}_channels")


def _pixel_shuffle(run: Converter, call: Call) -> Any:
    if len(call.output) != 4:
        return None
    factor = call["upscale_factor"]
    _, channels, height, width = call.shape("self")
    made = channels // factor**2
    name = call.layer_name
    x = run.layer(Reshape((-1, made, factor, factor, height, width)), (call["self"],), f"{name}_blocks")
    x = run.layer(Permute((0, 1, 4, 2, 5, 3)), (x,), name)
    return run.layer(Reshape((-1, *call.output[1:])), (x,), f"{name}_map")


def _pixel_unshuffle(run: Converter, call: Call) -> Any:
    if len(call.output) != 4:
        return None
    factor = call["downscale_factor"]
    _, channels, height, width = call.shape("self")
    name, blocks = call.layer_name, (-1, channels, height // factor, factor, width // factor, factor)
    x = run.layer(Reshape(blocks), (call["self"],), f"{name}_blocks")
    x = run.layer(Permute((0, 1, 3, 5, 2, 4)), (x,), name)
    return run.layer(Reshape((-1, *call.output[1:])), (x,), f"{name}_map")


def _vector_norm(run: Converter, call: Call) -> Any:
    """Convert a vector ``linalg.norm`` to ``linalg.vector_norm``."""
    dims = call["dim"]
    if call["ord"] not in (None, 2) or dims is None or len(dims) != 1 or call["dtype"] is not None:
        return None
    return run.function(
        torch.ops.aten.linalg_vector_norm.default, (call["self"], 2, dims, call["keepdim"]), {}, call.node.name
    )


def _filled(name: str) -> Rule:
    """Return the rule of a filled tensor whose size depends on the batch size; it gets the images' device."""

    def rule(run: Converter, call: Call) -> Any:
        size = call["size"]
        given = (run.images, size, call["fill_value"]) if "fill_value" in call.arguments else (run.images, size)
        dtype = {} if call["dtype"] is None else {"dtype": call["dtype"]}
        return run.function(getattr(torch.ops.aten, name).default, given, dtype, call.node.name)

    return rule


def _tile(run: Converter, call: Call) -> Any:
    """Convert ``tile`` to ``repeat``, which needs a number for each dimension."""
    rank = len(call.shape("self"))
    times = [*(1,) * (rank - len(call["dims"])), *call["dims"]]
    return run.function(torch.ops.aten.repeat.default, (call["self"], times), {}, call.node.name)


def _rms_norm(run: Converter, call: Call) -> Any:
    """Expand RMSNorm into elementary functions, since torch's ONNX exporter does not support it."""
    aten, x, name = torch.ops.aten, call["input"], call.node.name
    eps = torch.finfo(run.example_parameter.dtype).eps if call["eps"] is None else call["eps"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    squares = run.function(aten.pow.Tensor_Scalar, (x, 2), {}, f"{name}_squares")
    mean = run.function(aten.mean.dim, (squares, dims, True), {}, f"{name}_mean")
    inverse = run.function(aten.rsqrt.default, (run.function(aten.add.Scalar, (mean, eps), {}, name),), {}, name)
    normalized = run.function(aten.mul.Tensor, (x, inverse), {}, name)
    if not isinstance(call["weight"], Constant):
        return normalized
    weight = run.constant(call["weight"].tensor, call["weight"].name)
    return run.function(aten.mul.Tensor, (normalized, weight), {}, f"{name}_scaled")


def _attention(run: Converter, call: Call) -> Any:
    """Convert a constant boolean attention mask to an additive one, as ONNX needs; drop an all-True mask."""
    mask = call["attn_mask"]
    if isinstance(mask, fx.Node) and mask.target is torch.ops.aten.expand.default:  # expanded to the batch
        stored = run.stored_constant(mask.args[0])
        mask = None if stored is None else Constant(stored, call.layer_name)
    if not isinstance(mask, Constant) or mask.tensor.dtype != torch.bool:
        return None
    allowed = mask.tensor.to(run.example_parameter.device)
    lowest = torch.finfo(run.example_parameter.dtype).min / 2  # instead of -inf, which saved files may not contain
    summand = run.example_parameter.new_zeros(allowed.shape).masked_fill(~allowed, lowest)
    given = None if bool(mask.tensor.all()) else run.constant(summand, mask.name)
    kwargs = {"attn_mask": given, "is_causal": call["is_causal"], "scale": call["scale"]}
    return run.function(call.node.target, (call["query"], call["key"], call["value"]), kwargs, call.node.name)


LAYER_RULES: dict[str, Rule] = {
    "_to_copy": _cast,
    "_unsafe_view": _reshape,
    "adaptive_avg_pool1d": _adaptive_average,
    "adaptive_avg_pool2d": _adaptive_average,
    "adaptive_max_pool2d": _adaptive_maximum,
    "add": _add,
    "addmm": _biased_matrix_product,
    "alias": _first,
    "alpha_dropout": _first,
    "amax": _amax,
    "avg_pool2d": _average_pool,
    "batch_norm": _batch_norm,
    "cat": _concat,
    "channel_shuffle": _channel_shuffle,
    "chunk": _split,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "clamp_min": _clamp,
    "clone": _first,
    "concat": _concat,
    "constant_pad_nd": _pad,
    "contiguous": _first,
    "conv1d": _convolution_1d,
    "conv2d": _convolution,
    "detach": _first,
    "div": _div,
    "dropout": _dropout(nn.Dropout),
    "elu": _elu,
    "expand": _expand,
    "expand_as": _expand,
    "feature_alpha_dropout": _first,
    "feature_dropout": _dropout(nn.Dropout2d),
    "flatten": _reshape,
    "full": _filled("new_full"),
    "floor_divide": _floor_divide,
    "gelu": _simple(lambda call: nn.GELU(call["approximate"])),
    "group_norm": _group_norm,
    "hardsigmoid": _simple(lambda call: nn.Hardsigmoid()),
    "hardswish": _simple(lambda call: nn.Hardswish()),
    "hardtanh": _clamp,
    "layer_norm": _layer_norm,
    "leaky_relu": _simple(lambda call: nn.LeakyReLU(call["negative_slope"])),
    "lift_fresh_copy": _first,
    "linalg_norm": _vector_norm,
    "linear": _linear,
    "matmul": _matrix_product,
    "max": _maximum,
    "max_pool2d": _max_pool,
    "maximum": _maximum,
    "min": _minimum,
    "minimum": _minimum,
    "mean": _mean,
    "mish": _simple(lambda call: nn.Mish()),
    "mm": _matrix_product,
    "mul": _mul,
    "multiply": _mul,
    "narrow": _narrow,
    "neg": _neg,
    "numpy_T": _matrix_transpose,
    "ones": _filled("new_ones"),
    "pad": _pad,
    "permute": _permute,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "prelu": _prelu,
    "reflection_pad2d": _pad,
    "relu": _simple(lambda call: nn.ReLU()),
    "relu6": _simple(lambda call: nn.ReLU6()),
    "replication_pad2d": _pad,
    "reshape": _reshape,
    "reshape_as": _reshape,
    "rms_norm": _rms_norm,
    "rsub": _reversed_sub,
    "scaled_dot_product_attention": _attention,
    "select": _select,
    "sigmoid": _simple(lambda call: nn.Sigmoid()),
    "silu": _simple(lambda call: nn.SiLU()),
    "slice": _slice,
    "softmax": _simple(lambda call: nn.Softmax(call["dim"])),
    "softplus": _simple(lambda call: nn.Softplus(call["beta"], call["threshold"])),
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _reshape,
    "sub": _sub,
    "t": _matrix_transpose,
    "tanh": _simple(lambda call: nn.Tanh()),
    "tensor_split": _split,
    "tile": _tile,
    "to": _cast,
    "transpose": _transpose,
    "type_as": _cast,
    "unbind": _unbind,
    "unflatten": _reshape,
    "unsqueeze": _reshape,
    "upsample_nearest2d": _upsample_nearest,
    "view": _reshape,
    "view_as": _reshape,
    "zeros": _filled("new_zeros"),
}
"""Conversion rules by operator name, for in-place and out-of-place variants."""
