"""Conversion rules of ONNX operators to layers, or to float functions where there is no layer.

The rules create the same layers as :data:`qface.graph.aten.LAYER_RULES`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qface.graph.aten import Constant, along_one_dimension, clamp_layer
from qface.graph.layers import Add, ChannelAffine, Concat, L2Normalize, Maximum, Multiply, Slice
from qface.models.onnx_import.importer import Importer, Rule
from qface.models.onnx_import.onnx_file import Node
from qface.models.onnx_import.spatial_operators import SPATIAL_RULES

__all__ = ["OPERATOR_RULES"]

aten: Any = torch.ops.aten


# ---- layers with weights


def _parameters(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.register_parameter("weight", nn.Parameter(weight.contiguous()))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.contiguous()))
    return layer


def _linear(run: Importer, x: fx.Node, weight: Tensor, bias: Tensor | None, name: str) -> fx.Node:
    """Add a linear layer with ``weight`` [outputs, inputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return run.layer(_parameters(layer, weight, bias), (x,), name)


def _gemm(run: Importer, node: Node) -> Any:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    bias = run.weights(node, 2) if run.is_constant(node, 2) or not node.has(2) else None
    by_features = bias is None or bias.numel() in (1, bias.shape[-1])
    if run.is_constant(node, 1) and not run.is_constant(node, 0) and not node.get("transA", 0) and by_features:
        weight = run.required(node, 1) * alpha
        weight = weight if node.get("transB", 0) else weight.T
        if not node.has(2) or bias is not None:
            shift = None if bias is None else (beta * bias.flatten()).expand(weight.shape[0])
            return _linear(run, run.value(node), weight, shift, run.name_of(node))
    return _float_gemm(run, node, alpha, beta)


def _float_gemm(run: Importer, node: Node, alpha: float, beta: float) -> Any:
    name = run.name_of(node)
    sides = [
        run.function(aten.transpose.int, (side, 0, 1), {}, f"{name}_transposed") if node.get(flag, 0) else side
        for side, flag in ((run.tensor(node, 0), "transA"), (run.tensor(node, 1), "transB"))
    ]
    made = run.function(aten.matmul.default, tuple(sides), {}, name)
    if alpha != 1:
        made = run.function(aten.mul.Tensor, (made, alpha), {}, f"{name}_scaled")
    if not node.has(2):
        return made
    return run.function(aten.add.Tensor, (made, run.tensor(node, 2)), {"alpha": beta}, f"{name}_biased")


def _matmul(run: Importer, node: Node) -> Any:
    if run.is_constant(node, 1) and len(run.shape_of(node, 1)) == 2:
        return _linear(run, run.value(node), run.required(node, 1).T, None, run.name_of(node))
    return run.function(aten.matmul.default, (run.tensor(node, 0), run.tensor(node, 1)), {}, run.name_of(node))


def _batch_norm(run: Importer, node: Node) -> Any:
    if node.get("training_mode", 0) or node.get("spatial", 1) != 1:
        raise run.refuse(node, "training_mode=1" if node.get("training_mode", 0) else "spatial=0")
    kind = nn.BatchNorm2d if len(run.shape_of(node)) == 4 else nn.BatchNorm1d
    weight, bias, mean, variance = (run.required(node, position) for position in range(1, 5))
    layer = kind(len(weight), node.get("epsilon", 1e-5), device="meta")
    layer.register_buffer("running_mean", mean)
    layer.register_buffer("running_var", variance)
    layer.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
    return run.call(node, _parameters(layer, weight, bias))


def _prelu(run: Importer, node: Node) -> Any:
    slopes = run.required(node, 1)
    along = along_one_dimension(Constant(slopes, ""), len(run.shape_of(node)))
    if along is not None and along[0] in (None, 1):
        layer = nn.PReLU(slopes.numel(), device="meta")
        layer.weight = nn.Parameter(slopes.flatten())
        return run.call(node, layer)
    name = run.name_of(node)
    positive = run.call(node, nn.ReLU(), "_positive")
    negative = run.call(node, clamp_layer(None, 0), "_negative")
    sloped = run.function(aten.mul.Tensor, (negative, run.stored(node, 1)), {}, f"{name}_slope")
    return run.layer(Add(), (positive, sloped), name)


def _layer_norm(run: Importer, node: Node) -> Any:
    before = run.shape_of(node)
    shape = before[node.get("axis", -1) % len(before) :]
    weight = run.required(node, 1).expand(shape)
    bias = run.weights(node, 2)
    layer = nn.LayerNorm(shape, node.get("epsilon", 1e-5), device="meta")
    return run.call(node, _parameters(layer, weight, torch.zeros(shape) if bias is None else bias.expand(shape)))


def _rms_norm(run: Importer, node: Node) -> Any:
    before = run.shape_of(node)
    shape = list(before[node.get("axis", -1) % len(before) :])
    arguments = (run.value(node), shape, run.tensor(node, 1), node.get("epsilon", 1e-5))
    return run.function(aten.rms_norm.default, arguments, {}, run.name_of(node))


def _instance_norm(run: Importer, node: Node) -> Any:
    """Add a GroupNorm with one group per channel."""
    weight = run.required(node, 1)
    layer = nn.GroupNorm(len(weight), len(weight), node.get("epsilon", 1e-5), device="meta")
    return run.call(node, _parameters(layer, weight, run.required(node, 2)))


def _group_norm(run: Importer, node: Node) -> Any:
    channels, groups = run.shape_of(node)[1], node.get("num_groups")
    weight, bias = (run.required(node, position) for position in (1, 2))
    if run.opset < 21:
        weight, bias = (each.repeat_interleave(channels // groups) for each in (weight, bias))
    layer = nn.GroupNorm(groups, channels, node.get("epsilon", 1e-5), device="meta")
    return run.call(node, _parameters(layer, weight, bias))


# ---- sums and products, of tensors and constants


def _pair(run: Importer, node: Node) -> tuple[bool, bool]:
    """True for each of the two inputs that is constant."""
    return run.is_constant(node, 0), run.is_constant(node, 1)


def _add(run: Importer, node: Node) -> Any:
    left, right = _pair(run, node)
    if not left and not right:
        return run.layer(Add(), (run.value(node), run.value(node, 1)), run.name_of(node))
    return (
        _as_bias(run, node, right)
        or _affine(run, node, 0 if right else 1, 1, 1 if right else 0)
        or _binary(run, node, aten.add.Tensor)
    )


def _as_bias(run: Importer, node: Node, right: bool) -> Any:
    """Add a constant to the bias of the layer before it; Keras and ``x @ W + b`` export biases as an Add."""
    tensor, constant = (0, 1) if right else (1, 0)
    value = run.value(node, tensor)
    maker, dims = run.before_permutation(value)
    layer = run.layer_of(maker)
    is_free = len(maker.users) == (maker is not value) and run.readers(node.inputs[tensor]) == 1
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.bias is not None or not is_free:
        return None
    bias = run.required(node, constant)
    along = along_one_dimension(Constant(bias, ""), len(dims))
    channels = 1 if isinstance(layer, nn.Conv2d) else len(dims) - 1
    if along is None or bias.numel() not in (1, len(layer.weight)):
        return None
    if along[0] is not None and dims[along[0]] != channels:
        return None
    layer.bias = nn.Parameter(along[1].expand(len(layer.weight)).clone())
    return value


def _sub(run: Importer, node: Node) -> Any:
    left, right = _pair(run, node)
    if right:
        return _affine(run, node, 0, 1, 1, shift_factor=-1) or _binary(run, node, aten.sub.Tensor)
    if left:
        return _affine(run, node, 1, -1, 0) or _binary(run, node, aten.sub.Tensor)
    return _binary(run, node, aten.sub.Tensor)


def _mul(run: Importer, node: Node) -> Any:
    left, right = _pair(run, node)
    if not left and not right:
        return run.layer(Multiply(), (run.value(node), run.value(node, 1)), run.name_of(node))
    constant = 1 if right else 0
    factor = run.required(node, constant)
    return _scaled(run, node, 1 - constant, factor) or _binary(run, node, aten.mul.Tensor)


def _div(run: Importer, node: Node) -> Any:
    if run.is_constant(node, 1):
        inverse = (1 / run.required(node, 1).double()).float()
        return _scaled(run, node, 0, inverse) or _binary(run, node, aten.div.Tensor)
    return _binary(run, node, aten.div.Tensor)


def _negative(run: Importer, node: Node) -> Any:
    return _scaled(run, node, 0, torch.tensor(-1.0))


def _affine(
    run: Importer, node: Node, tensor: int, factor: float, constant: int, shift_factor: float = 1
) -> fx.Node | None:
    """Add ``factor * x + constant`` if the constant varies along at most one dimension."""
    shift = run.required(node, constant) * shift_factor
    return _affine_layer(run, node, tensor, torch.tensor(float(factor)), shift)


def _scaled(run: Importer, node: Node, tensor: int, factor: Tensor) -> fx.Node | None:
    return _affine_layer(run, node, tensor, factor, torch.zeros(()))


def _affine_layer(run: Importer, node: Node, tensor: int, factor: Tensor, shift: Tensor) -> fx.Node | None:
    shape = run.shape_of(node, tensor)
    along = [along_one_dimension(Constant(each, ""), len(shape)) for each in (factor, shift)]
    if along[0] is None or along[1] is None or not bool(torch.isfinite(factor).all()):
        return None
    (first, factors), (second, shifts) = along[0], along[1]
    dims = {dim for dim in (first, second) if dim is not None}
    channels = max(len(factors), len(shifts))
    if len(dims) > 1 or 0 in dims or (dims and shape[min(dims)] != channels):
        return None
    return _channel_affine(run, run.value(node, tensor), factors, shifts, dims.pop() if dims else 1, run.name_of(node))


def _channel_affine(run: Importer, x: fx.Node, factors: Tensor, shifts: Tensor, dim: int, name: str) -> fx.Node:
    channels = max(len(factors), len(shifts))
    source, dims = run.before_permutation(x)
    layer = ChannelAffine(channels, dims[dim] if channels > 1 else 1)
    layer.weight = nn.Parameter(factors.expand(channels).clone())
    layer.bias = nn.Parameter(shifts.expand(channels).clone())
    return run.permuted(run.layer(layer, (source,), name), dims, f"{name}_permuted")


def _one_number(run: Importer, x: fx.Node, factor: float, shift: float, name: str) -> fx.Node:
    return _channel_affine(run, x, torch.tensor([factor]), torch.tensor([shift]), 1, name)


def _binary(run: Importer, node: Node, target: Any) -> fx.Node:
    return run.function(target, (run.tensor(node, 0), run.tensor(node, 1)), {}, run.name_of(node))


def _comparison(target: Any) -> Rule:
    return lambda run, node: _binary(run, node, target)


def _all_of(combine: Callable[[Importer, Node], Any]) -> Rule:
    """Return the rule of an operator with any number of inputs, which are combined two at a time."""

    def rule(run: Importer, node: Node) -> Any:
        if len(node.inputs) == 1:
            return run.value(node)
        first, so_far = node.inputs[0], f"{node.outputs[0]}/so far"
        for name in node.inputs[1:]:
            run.name_value(so_far, combine(run, replace(node, inputs=(first, name))))
            first = so_far
        return run.named_value(so_far)

    return rule


def _mean_of_all(run: Importer, node: Node) -> Any:
    total: Any = _all_of(_add)(run, node)
    return _one_number(run, total, 1 / len(node.inputs), 0.0, run.name_of(node))


def _limit(kind: str) -> Rule:
    """Return the rule of Max or Min of two inputs; a constant scalar becomes a clamp."""

    def rule(run: Importer, node: Node) -> Any:
        left, right = _pair(run, node)
        if (left or right) and math.prod(run.shape_of(node, 1 if right else 0)) == 1:
            limit = float(run.required(node, 1 if right else 0))
            layer = clamp_layer(limit, None) if kind == "max" else clamp_layer(None, limit)
            return run.layer(layer, (run.value(node, 0 if right else 1),), run.name_of(node))
        if kind == "max" and not left and not right:
            return run.layer(Maximum(), (run.value(node), run.value(node, 1)), run.name_of(node))
        return _binary(run, node, aten.maximum.default if kind == "max" else aten.minimum.default)

    return rule


def _power(run: Importer, node: Node) -> Any:
    if run.is_constant(node, 1) and math.prod(run.shape_of(node, 1)) == 1:
        exponent = float(run.required(node, 1))
        whole = int(exponent) if exponent.is_integer() else exponent
        return run.function(aten.pow.Tensor_Scalar, (run.value(node), whole), {}, run.name_of(node))
    return _binary(run, node, aten.pow.Tensor_Tensor)


def _where(run: Importer, node: Node) -> Any:
    values = tuple(run.tensor(node, position) for position in range(3))
    return run.function(aten.where.self, values, {}, run.name_of(node))


# ---- functions of one value


def _simple(make: Callable[[Node], nn.Module]) -> Rule:
    """Return a rule that adds an elementwise layer of the first input."""
    return lambda run, node: run.elementwise(make(node), run.value(node), run.name_of(node))


def _function(target: Any) -> Rule:
    """Return a rule that adds a function of the first input."""
    return lambda run, node: run.function(target, (run.value(node),), {}, run.name_of(node))


def _same(run: Importer, node: Node) -> Any:
    """Return the input unchanged."""
    return run.value(node)


def _cast(run: Importer, node: Node) -> Any:
    """Cast to int64 or float32; other float types were replaced by float32 when the file was read."""
    x = run.value(node)
    dtype = _TORCH_TYPES.get(node.get("to", 1))
    if dtype is None:
        raise run.refuse(node, f"the target type {node.get('to')}")
    if x.meta["value"].dtype == dtype:
        return x
    return run.function(aten.to.dtype, (x, dtype), {}, run.name_of(node))


_TORCH_TYPES = {1: torch.float32, 6: torch.int64, 7: torch.int64}  # keys are values of onnx.TensorProto.DataType


def _clip(run: Importer, node: Node) -> Any:
    low, high = (
        node.get(name) if name in node.attributes else _number(run.array(node, position))
        for position, name in ((1, "min"), (2, "max"))
    )
    return run.call(node, clamp_layer(_real_limit(low, -_FLOAT32_MAX), _real_limit(high, _FLOAT32_MAX)))


_FLOAT32_MAX = 3.402e38  # exporters write the float32 maximum, in fp16 infinity, for "no limit"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _real_limit(limit: float | None, limit_of_dtype: float) -> float | None:
    return None if limit is None or abs(limit) >= abs(limit_of_dtype) else limit


def _elu(run: Importer, node: Node) -> Any:
    return run.call(node, nn.ELU(node.get("alpha", 1.0)))


def _selu(run: Importer, node: Node) -> Any:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    made = run.call(node, nn.ELU(alpha), "_elu")
    return _one_number(run, made, gamma, 0.0, run.name_of(node))


def _celu(run: Importer, node: Node) -> Any:
    alpha, name = node.get("alpha", 1.0), run.name_of(node)
    inner = _one_number(run, run.value(node), 1 / alpha, 0.0, f"{name}_scaled")
    return _one_number(run, run.layer(nn.ELU(), (inner,), f"{name}_elu"), alpha, 0.0, name)


def _hard_sigmoid(run: Importer, node: Node) -> Any:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return run.call(node, nn.Hardsigmoid())
    line = _one_number(run, run.value(node), alpha, beta, f"{run.name_of(node)}_line")
    return run.layer(nn.Hardtanh(0.0, 1.0), (line,), run.name_of(node))


def _softmax(run: Importer, node: Node) -> Any:
    shape, name = run.shape_of(node), run.name_of(node)
    axis = node.get("axis", -1 if run.opset >= 13 else 1) % len(shape)
    if run.opset >= 13 or axis == len(shape) - 1:
        return run.call(node, nn.Softmax(axis))
    rows = (math.prod(shape[:axis]), math.prod(shape[axis:]))  # opsets before 13 flatten to two dimensions
    made = run.layer(nn.Softmax(1), (run.reshape(run.value(node), rows, f"{name}_rows"),), name)
    return run.reshape(made, shape, f"{name}_shape")


def _log_softmax(run: Importer, node: Node) -> Any:
    return run.function(aten.log.default, (_softmax(run, node),), {}, f"{run.name_of(node)}_log")


# ---- reductions


def _axes(run: Importer, node: Node, position: int = 1) -> list[int] | None:
    """Return the reduced dimensions as numbers >= 0; None if the operator does nothing."""
    rank = len(run.shape_of(node))
    axes = run.integers(node, position, "axes")
    if not axes:
        if node.get("noop_with_empty_axes", 0):
            return None
        axes = list(range(rank))
    found = sorted({axis % rank for axis in axes})
    if any(run.counts(run.shape_of(node)[axis]) for axis in found):
        raise run.refuse(node, "an axis that is the batch")
    return found


def _reduction(reduce: Callable[[Importer, fx.Node, list[int], bool, str], fx.Node]) -> Rule:
    """Return the rule of a reduction; ``reduce`` adds its layer or function."""

    def rule(run: Importer, node: Node) -> Any:
        axes = _axes(run, node)
        if axes is None:
            return run.value(node)
        return reduce(run, run.value(node), axes, bool(node.get("keepdims", 1)), run.name_of(node))

    return rule


def _mean(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    if axes == [2, 3] and len(run.sizes(x)) == 4:
        return _pooled(run, x, nn.AdaptiveAvgPool2d(1), keep, name)
    return run.function(aten.mean.dim, (x, axes, keep), {}, name)


def _reduce_max(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    if axes == [2, 3] and len(run.sizes(x)) == 4:
        kernel = run.sizes(x)[2:]
        return _pooled(run, x, nn.MaxPool2d(kernel, kernel), keep, name)
    return run.function(aten.amax.default, (x, axes, keep), {}, name)


def _pooled(run: Importer, x: fx.Node, pool: nn.Module, keep: bool, name: str) -> fx.Node:
    made = run.layer(pool, (x,), name)
    return made if keep else run.layer(nn.Flatten(1), (made,), f"{name}_flatten")


def _reduce_min(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    return run.function(aten.amin.default, (x, axes, keep), {}, name)


def _reduce_sum(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    return run.function(aten.sum.dim_IntList, (x, axes, keep), {}, name)


def _reduce_sum_square(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    return _reduce_sum(run, run.layer(Multiply(), (x, x), f"{name}_square"), axes, keep, name)


def _reduce_l1(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    return _reduce_sum(run, run.function(aten.abs.default, (x,), {}, f"{name}_abs"), axes, keep, name)


def _reduce_l2(run: Importer, x: fx.Node, axes: list[int], keep: bool, name: str) -> fx.Node:
    return run.function(aten.linalg_vector_norm.default, (x, 2, axes, keep), {}, name)


def _lp_normalization(run: Importer, node: Node) -> Any:
    x, shape, name = run.value(node), run.shape_of(node), run.name_of(node)
    order, axis = node.get("p", 2), node.get("axis", -1) % len(shape)
    if order == 2 and len(shape) == 2 and axis == 1:
        return run.layer(L2Normalize(), (x,), name)
    norm = run.function(aten.linalg_vector_norm.default, (x, order, [axis], True), {}, f"{name}_norm")
    return run.function(aten.div.Tensor, (x, norm), {}, name)


# ---- shapes


def _reshape(run: Importer, node: Node) -> Any:
    x, before = run.value(node), run.shape_of(node)
    wanted = run.integers(node, 1, "shape")
    if wanted is None:
        raise run.refuse(node, "no shape")
    if not node.get("allowzero", 0):
        wanted = [before[position] if size == 0 else size for position, size in enumerate(wanted)]
    if -1 in wanted:
        wanted = _with_the_rest(run, node, wanted, before)
    else:
        wanted = run.per_image(wanted, before)
    return run.reshape(x, wanted, run.name_of(node))


def _with_the_rest(run: Importer, node: Node, wanted: list[int], before: Sequence[int]) -> list[int]:
    """Replace -1 in ``wanted``; a first size that is a multiple of the file's fixed batch size is scaled."""
    position = wanted.index(-1)
    total, others = math.prod(before), math.prod(size for size in wanted if size != -1)
    declared = run.declared_batch
    if position > 0 and declared and not any(map(run.counts, wanted)) and wanted[0] % declared == 0:
        wanted = [wanted[0] // declared * run.batch, *wanted[1:]]
        others = math.prod(size for size in wanted if size != -1)
    if others == 0 or total % others:
        raise run.refuse(node, f"the invalid shape {wanted}")
    return [total // others if size == -1 else size for size in wanted]


def _flatten(run: Importer, node: Node) -> Any:
    shape = run.shape_of(node)
    axis = node.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    rows = (math.prod(shape[:axis]), math.prod(shape[axis:]))
    return run.reshape(run.value(node), rows, run.name_of(node))


def _squeeze(run: Importer, node: Node) -> Any:
    shape = run.shape_of(node)
    axes = run.integers(node, 1, "axes")
    gone = {axis % len(shape) for axis in axes} if axes else {n for n, size in enumerate(shape) if size == 1}
    return run.reshape(run.value(node), [size for n, size in enumerate(shape) if n not in gone], run.name_of(node))


def _unsqueeze(run: Importer, node: Node) -> Any:
    shape = list(run.shape_of(node))
    axes = run.integers(node, 1, "axes") or []
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return run.reshape(run.value(node), shape, run.name_of(node))


def _transpose(run: Importer, node: Node) -> Any:
    x = run.value(node)
    return run.permuted(x, node.get("perm", range(len(run.sizes(x)))[::-1]), run.name_of(node))


def _slice(run: Importer, node: Node) -> Any:
    x, shape = run.value(node), run.shape_of(node)
    starts, ends = run.integers(node, 1, "starts"), run.integers(node, 2, "ends")
    axes = run.integers(node, 3, "axes") or list(range(len(starts or [])))
    steps = run.integers(node, 4) or [1] * len(axes)
    for start, end, axis, step in zip(starts or [], ends or [], axes, steps, strict=True):
        x = _part(run, node, x, axis % len(shape), start, end, step)
    return x


def _part(run: Importer, node: Node, x: fx.Node, dim: int, start: int, end: int, step: int) -> fx.Node:
    size, name = run.sizes(x)[dim], run.name_of(node)
    indices = range(*slice(start, end if step > 0 or end >= -size else None, step).indices(size))
    if len(indices) == size and step == 1:
        return x
    if run.counts(size):
        raise run.refuse(node, "a slice of the batch")
    if step > 0 and dim == 0:
        return run.function(aten.slice.Tensor, (x, dim, indices.start, indices.stop, step), {}, name)
    if step > 0:
        return run.layer(Slice(dim, indices.start, indices.stop, step), (x,), name)
    if len(indices) == size:
        return run.function(aten.flip.default, (x, [dim]), {}, name)
    return _selected(run, x, dim, list(indices), name)


def _selected(run: Importer, x: fx.Node, dim: int, indices: list[int], name: str) -> fx.Node:
    kept = run.keep(torch.tensor(indices), f"{name}_indices")
    return run.function(aten.index_select.default, (x, dim, kept), {}, name)


def _split(run: Importer, node: Node) -> Any:
    x, shape = run.value(node), run.shape_of(node)
    dim = node.get("axis", 0) % len(shape)
    parts = run.integers(node, 1, "split")
    if parts is None:
        count = node.get("num_outputs", len(node.outputs))
        size = -(-shape[dim] // count)
        parts = [min(size, shape[dim] - size * number) for number in range(count)]
    bounds = np.cumsum([0, *parts]).tolist()
    return [_part(run, node, x, dim, *each, 1) for each in itertools.pairwise(bounds)]


def _gather(run: Importer, node: Node) -> Any:
    x, shape, name = run.value(node), run.shape_of(node), run.name_of(node)
    dim = node.get("axis", 0) % len(shape)
    indices = run.array(node, 1)
    if indices is None or run.counts(shape[dim]):
        raise run.refuse(node, "indices into the batch")
    chosen = [int(each) % shape[dim] for each in indices.flatten()]
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        made = _part(run, node, x, dim, chosen[0], chosen[-1] + 1, 1)
    else:
        made = _selected(run, x, dim, chosen, name)
    return run.reshape(made, (*shape[:dim], *indices.shape, *shape[dim + 1 :]), f"{name}_shape")


def _concat(run: Importer, node: Node) -> Any:
    tensors = [_for_each_image(run, node, position) for position in range(len(node.inputs))]
    if len(tensors) == 1:
        return tensors[0]
    dim = node.get("axis", 1) % len(run.sizes(tensors[0]))
    if any(run.counts(run.sizes(tensor)[dim]) for tensor in tensors):
        raise run.refuse(node, "an axis that is the batch")
    if dim == 0:
        return run.function(aten.cat.default, (tensors,), {}, run.name_of(node))
    return run.layer(Concat(dim), tuple(tensors), run.name_of(node))


def _for_each_image(run: Importer, node: Node, position: int) -> fx.Node:
    """Return the node of input ``position``; a constant for one image is repeated for the batch."""
    made = run.repeated(node, position)
    shape = run.sizes(made)
    if not run.is_constant(node, position) or run.counts(shape[0]) or node.get("axis", 1) % len(shape) == 0:
        return made
    if shape[0] != 1:
        raise run.refuse(node, f"a constant input with batch size {shape[0]}")
    sizes = [run.count_of_images(), *shape[1:]]
    return run.function(aten.expand.default, (made, sizes), {}, f"{run.name_of(node)}_repeated")


def _expand(run: Importer, node: Node) -> Any:
    x, before = run.value(node), run.shape_of(node)
    wanted = run.integers(node, 1) or []
    wanted = [1] * (len(before) - len(wanted)) + wanted
    before = (1,) * (len(wanted) - len(before)) + before
    after = [max(size, other) for size, other in zip(wanted, before, strict=True)]
    if tuple(after) == run.shape_of(node):
        return x
    return run.function(
        aten.expand.default, (x, [-1 if run.counts(size) else size for size in after]), {}, run.name_of(node)
    )


def _tile(run: Importer, node: Node) -> Any:
    repeats = run.integers(node, 1) or []
    if repeats[0] != 1:
        raise run.refuse(node, "repeats of the batch")
    return run.function(aten.repeat.default, (run.value(node), repeats), {}, run.name_of(node))


def _einsum(run: Importer, node: Node) -> Any:
    tensors = [run.tensor(node, position) for position in range(len(node.inputs))]
    return run.function(aten.einsum.default, (node.get("equation"), tensors), {}, run.name_of(node))


OPERATOR_RULES: dict[str, Rule] = {
    "Abs": _function(aten.abs.default),
    "Add": _add,
    "And": _comparison(aten.logical_and.default),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _same,
    "Ceil": _function(aten.ceil.default),
    "Celu": _celu,
    "Clip": _clip,
    "Concat": _concat,
    "Cos": _function(aten.cos.default),
    "Div": _div,
    "Dropout": _same,
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _comparison(aten.eq.Tensor),
    "Erf": _function(aten.erf.default),
    "Exp": _function(aten.exp.default),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _function(aten.floor.default),
    "Gather": _gather,
    "Gelu": _simple(lambda node: nn.GELU(node.get("approximate", "none"))),
    "Gemm": _gemm,
    "Greater": _comparison(aten.gt.Tensor),
    "GreaterOrEqual": _comparison(aten.ge.Tensor),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _simple(lambda node: nn.Hardswish()),
    "Identity": _same,
    "IsNaN": _function(aten.isnan.default),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _simple(lambda node: nn.LeakyReLU(node.get("alpha", 0.01))),
    "Less": _comparison(aten.lt.Tensor),
    "LessOrEqual": _comparison(aten.le.Tensor),
    "Log": _function(aten.log.default),
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "MatMul": _matmul,
    "Max": _all_of(_limit("max")),
    "Mean": _mean_of_all,
    "Min": _all_of(_limit("min")),
    "Mish": _simple(lambda node: nn.Mish()),
    "Mul": _mul,
    "Neg": _negative,
    "Not": _function(aten.logical_not.default),
    "Or": _comparison(aten.logical_or.default),
    "PRelu": _prelu,
    "Pow": _power,
    "RMSNormalization": _rms_norm,
    "Reciprocal": _function(aten.reciprocal.default),
    "ReduceL1": _reduction(_reduce_l1),
    "ReduceL2": _reduction(_reduce_l2),
    "ReduceMax": _reduction(_reduce_max),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_reduce_min),
    "ReduceSum": _reduction(_reduce_sum),
    "ReduceSumSquare": _reduction(_reduce_sum_square),
    "Relu": _simple(lambda node: nn.ReLU()),
    "Reshape": _reshape,
    "Round": _function(aten.round.default),
    "Selu": _selu,
    "Sigmoid": _simple(lambda node: nn.Sigmoid()),
    "Sign": _function(aten.sign.default),
    "Sin": _function(aten.sin.default),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _simple(lambda node: nn.Softplus()),
    "Split": _split,
    "Sqrt": _function(aten.sqrt.default),
    "Squeeze": _squeeze,
    "Sub": _sub,
    "Sum": _all_of(_add),
    "Swish": _simple(lambda node: nn.SiLU()),
    "Tanh": _simple(lambda node: nn.Tanh()),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    **SPATIAL_RULES,
}
"""Conversion rules by operator."""
