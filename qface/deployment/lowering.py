"""Lowering of a student, an FX graph with fake-quantization modules, to an :class:`IntegerGraph`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from qface.deployment import integer_graph as ir
from qface.deployment.float_islands import island_module
from qface.errors import ConfigError, ExportError, UnsupportedLayerError
from qface.graph import layers
from qface.graph.queries import (
    input_of,
    is_clamp,
    is_quantized,
    is_shape_only,
    layer_of,
    limits_of,
    makes_rows,
    pair_of,
)
from qface.preprocessing import example_input, preprocessing_of
from qface.quantization import (
    ImageFakeQuantize,
    LSQFakeQuantize,
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedGlobalAveragePool,
    QuantizedLinear,
    QuantizedPReLU,
)
from qface.quantization.fake_quantize import NOT_CALIBRATED
from qface.quantization.placement import computes_in_float
from qface.quantization.qparams import shifts
from qface.quantization.quantized_layers import AFFINE_BITS, Quantizer, is_quantizer
from qface.quantization.student_modes import deployed_mode

__all__ = ["lower", "value_name"]


def lower(student: nn.Module) -> ir.IntegerGraph:
    """Convert a calibrated student to its integer graph.

    Args:
        student: calibrated student; it is not changed.

    Raises:
        ConfigError: the student is not quantized, or not calibrated.
        UnsupportedLayerError: a node has no integer form; the message names it.
        ExportError: the network does not map images to one tensor of embeddings, or has an unsupported quantizer
            placement.
    """
    if not isinstance(student, fx.GraphModule) or not is_quantized(student):
        raise ConfigError("this network is not quantized; give a student: run qface quantize, then qface calibrate")
    return _Lowering(student).run()


class _Lowering:
    """Conversion of the nodes in graph order; ``values`` maps each node to its output value."""

    def __init__(self, student: fx.GraphModule) -> None:
        self.student = student
        self.values: dict[fx.Node, ir.Value] = {}
        self.operations: list[ir.IntegerOp] = []
        self._absorbed: set[fx.Node] = set()
        self._island: list[fx.Node] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def run(self) -> ir.IntegerGraph:
        self._run_once()
        images = embedding = None
        dimensions = 0
        for node in self.student.graph.nodes:
            if node.op == "placeholder":
                images = self.values[node] = ir.Value("images")
            elif self._is_float(node):
                self._island.append(node)
            elif node not in self._absorbed:
                self._finish_island()
                if node.op == "output":
                    embedding = self._embedding(node)
                    dimensions = self._shapes[node.name][1]
                else:
                    self._lower(node)
        assert images is not None and embedding is not None
        return ir.IntegerGraph(images, tuple(self.operations), embedding, preprocessing_of(self.student), dimensions)

    def _run_once(self) -> None:
        """Record the output shape and dtype of each node for a batch of two images."""
        inputs = [node for node in self.student.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise ExportError(f"the network has {len(inputs)} inputs; its only input must be the images")
        recorder = _ShapeRecorder(self.student)
        with deployed_mode(self.student), torch.no_grad():
            recorder.run(example_input(self.student))
        self._shapes, self._dtypes = recorder.shapes, recorder.dtypes

    def _embedding(self, node: fx.Node) -> ir.Value:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            raise ExportError("the network returns several tensors; wrap it to return the embeddings only")
        shape = self._shapes[node.name]
        if len(shape) != 2:
            raise ExportError(f"the network must return embeddings [N, dimensions], got {list(shape)}; flatten them")
        return self._value(result)

    # ---- float islands

    def _is_float(self, node: fx.Node) -> bool:
        """True for nodes without an integer form, and for shape-only nodes all of whose inputs are float."""
        if node.op in ("get_attr", "call_function"):
            return True
        if is_shape_only(node):
            return all(each in self._island or self._reads_float(each) for each in node.all_input_nodes)
        layer = layer_of(node)
        return computes_in_float(node) and type(layer) not in (layers.L2Normalize, QuantizedAffine)

    def _reads_float(self, node: fx.Node) -> bool:
        return node in self.values and self.values[node].qparams is None

    def _finish_island(self) -> None:
        """Append one operation for the float layers since the last integer operation."""
        nodes, self._island = self._island, []
        inside = set(nodes)
        outputs = [node for node in nodes if not inside.issuperset(node.users) and self._is_tensor(node)]
        if not outputs:
            return  # only sizes, which each island computes for itself
        module, sources = island_module(self.student, nodes, outputs)
        made = tuple(_value_of(node, None) for node in outputs)
        self.values.update(zip(outputs, made, strict=True))
        inputs = tuple(self.values[source] for source in sources)
        shapes = tuple(self._shapes[source.name] for source in sources)
        name = next((str(node.target) for node in nodes if node.op == "call_module"), outputs[0].name)
        dtypes = tuple(self._dtypes[source.name] for source in sources)
        self.operations.append(ir.FloatIslandOp(name, inputs, made[0], made, module, shapes, dtypes))

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.op != "get_attr" and bool(self._shapes[node.name])

    # ---- integers

    def _lower(self, node: fx.Node) -> None:
        layer = layer_of(node)
        if isinstance(layer, Quantizer):
            self._lower_quantizer(node, layer)
            return
        lower_layer = _LOWERINGS.get(type(layer)) if layer is not None else None
        if lower_layer is None:
            what = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", node.target)
            raise UnsupportedLayerError(
                f"node {node.name!r} ({what}) has no integer form that qface can export; replace it by a standard layer"
            )
        self.operations.append(lower_layer(self, node, layer))

    def _lower_quantizer(self, node: fx.Node, layer: Quantizer) -> None:
        """Append a quantize operation after a float value; other quantizers are part of the operation before."""
        source = input_of(node)
        if self.values[source].qparams is not None:
            self.values[node] = self.values[source]
            return
        named = source if source.op == "placeholder" else node
        value = self.values[node] = _value_of(named, _qparams_of(layer, node))
        inputs = (self.values[source],)
        if source.op == "placeholder":
            offset = layer.offset if isinstance(layer, ImageFakeQuantize) else 0.0
            self.operations.append(ir.QuantizeImageOp(source.name, inputs, value, offset))
        else:
            self.operations.append(ir.QuantizeOp(node.name, inputs, value))

    def _value(self, argument: Any) -> ir.Value:
        return self.values[argument]

    def _inputs(self, node: fx.Node) -> tuple[ir.Value, ...]:
        return tuple(self._value(argument) for argument in node.args if isinstance(argument, fx.Node))

    def _output(self, node: fx.Node, last: fx.Node | None = None) -> ir.Value:
        """Create the value of ``node``, with the qparams of the quantizer after it (or after ``last``)."""
        last = last or node
        users = [user for user in last.users if is_quantizer(user)]
        if users and len(users) != len(last.users):
            raise ExportError(
                f"the output of {last.name!r} has quantized and unquantized consumers, which no runtime supports; "
                "quantize the network again with qface.quantize"
            )
        qparams = _qparams_of(cast(Quantizer, layer_of(users[0])), users[0]) if users else None
        value = _value_of(node, qparams)
        self.values[node] = self.values[last] = value
        return value

    def _with_qparams_of_input(self, node: fx.Node) -> ir.Value:
        value = self.values[node] = _value_of(node, self._value(node.args[0]).qparams)
        return value

    def _rank(self, node: fx.Node) -> int:
        return len(self._shapes[node.name])

    # ---- one method per layer

    def convolution(self, node: fx.Node, layer: QuantizedConv2d) -> ir.IntegerOp:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UnsupportedLayerError(
                f"layer {node.target!r} has padding {layer.padding!r} and padding_mode {layer.padding_mode!r}; "
                "only zero padding in pixels can be exported"
            )
        return ir.ConvolutionOp(
            **self._matmul(node, layer),
            size=cast(ir.Pair, self._shapes[input_of(node).name][2:]),
            stride=pair_of(layer.stride),
            padding=pair_of(layer.padding),
            dilation=pair_of(layer.dilation),
            groups=layer.groups,
        )

    def linear(self, node: fx.Node, layer: QuantizedLinear) -> ir.IntegerOp:
        if self._rank(node) != 2:
            raise UnsupportedLayerError(
                f"layer {node.target!r} has an input of {self._rank(node)} dimensions; flatten it to [N, features]"
            )
        return ir.LinearOp(**self._matmul(node, layer))

    def _matmul(self, node: fx.Node, layer: QuantizedConv2d | QuantizedLinear) -> dict[str, Any]:
        source = self._value(node.args[0])
        if source.qparams is None:
            raise ExportError(
                f"the input of layer {node.target!r} is not quantized; quantize the network again with qface.quantize"
            )
        integers = layer.bias_integers()
        bias = None if integers is None else integers.to(torch.int32).cpu().numpy()
        clamp = self._clamp_after(node)
        return {
            "name": str(node.target),
            "inputs": (source,),
            "output": self._output(node, clamp),
            "weight": _weight(layer),
            "bias": bias,
            "clamp": _limits(clamp),
        }

    def _clamp_after(self, node: fx.Node) -> fx.Node | None:
        """Return the ReLU that is the only consumer of ``node``, to be fused into its operation."""
        users = list(node.users)
        if len(users) == 1 and is_clamp(users[0]):
            self._absorbed.add(users[0])
            return users[0]
        return None

    def prelu(self, node: fx.Node, layer: QuantizedPReLU) -> ir.IntegerOp:
        slopes = _int8(layer.slope_integers())
        scale = float(layer.weight_fake_quant.exact_scale())
        return ir.PReluOp(str(node.target), self._inputs(node), self._output(node), self._rank(node), slopes, scale)

    def affine(self, node: fx.Node, layer: QuantizedAffine) -> ir.IntegerOp:
        name, inputs, rank = str(node.target), self._inputs(node), self._rank(node)
        if not layer.quant_context.complete:
            output = self._output(node)
            return ir.FloatAffineOp(name, inputs, output, rank, layer.dim, _float32(layer.weight), _float32(layer.bias))
        clamp = self._clamp_after(node)
        integers, scale, bias = layer.integers()
        weight = ir.Weight(_int8(integers), _float32(scale), AFFINE_BITS)
        integer_bias = bias.to(torch.int32).cpu().numpy()
        return ir.AffineOp(name, inputs, self._output(node, clamp), rank, weight, integer_bias, _limits(clamp))

    def clamp(self, node: fx.Node, layer: nn.Module) -> ir.IntegerOp:
        """Convert a clamp that is not fused into the layer before it."""
        return ir.ClampOp(str(node.target), self._inputs(node), self._output(node), limits_of(layer))

    def concat(self, node: fx.Node, layer: layers.Concat) -> ir.IntegerOp:
        return ir.ConcatOp(str(node.target), self._inputs(node), self._output(node), layer.dim)

    def average_pool(self, node: fx.Node, layer: nn.AvgPool2d) -> ir.IntegerOp:
        if layer.divisor_override is not None:
            raise UnsupportedLayerError(
                f"layer {node.target!r} has divisor_override={layer.divisor_override}; leave it out for the export"
            )
        if layer.ceil_mode and layer.count_include_pad and any(pair_of(layer.padding)):
            raise UnsupportedLayerError(
                f"layer {node.target!r} has ceil_mode and count_include_pad, for which onnxruntime's integer kernel "
                "computes a different average; set one of them to False"
            )
        return ir.AveragePoolOp(
            str(node.target),
            self._inputs(node),
            self._output(node),
            **_window(layer),
            count_include_pad=layer.count_include_pad,
        )

    def max_pool(self, node: fx.Node, layer: nn.MaxPool2d) -> ir.IntegerOp:
        return ir.MaxPoolOp(
            str(node.target),
            self._inputs(node),
            self._with_qparams_of_input(node),
            **_window(layer),
            dilation=pair_of(layer.dilation),
        )

    def add(self, node: fx.Node, layer: layers.Add) -> ir.IntegerOp:
        clamp = self._clamp_after(node)
        return ir.AddOp(str(node.target), self._inputs(node), self._output(node, clamp), _limits(clamp))

    def maximum(self, node: fx.Node, layer: layers.Maximum) -> ir.IntegerOp:
        if is_shape_only(node):
            return self._move(node, "Max")
        return ir.MaxOp(str(node.target), self._inputs(node), self._output(node))

    def pad(self, node: fx.Node, layer: layers.Pad) -> ir.IntegerOp:
        left, right, top, bottom, *channels = layer.padding
        first, last = channels or (0, 0)
        pads, mode = (0, first, top, left, 0, last, bottom, right), {"replicate": "edge"}.get(layer.mode, layer.mode)
        return ir.PadOp(str(node.target), self._inputs(node), self._with_qparams_of_input(node), pads, mode)

    def permute(self, node: fx.Node, layer: layers.Permute) -> ir.IntegerOp:
        return self._move(node, "Transpose", perm=layer.dims)

    def reshape(self, node: fx.Node, layer: layers.Reshape) -> ir.IntegerOp:
        return self._move(node, "Reshape", np.array(layer.shape))

    def slice(self, node: fx.Node, layer: layers.Slice) -> ir.IntegerOp:
        operands = (np.array([value]) for value in (layer.start, layer.stop, layer.dim, layer.step))
        return self._move(node, "Slice", *operands)

    def upsample(self, node: fx.Node, layer: layers.UpsampleNearest) -> ir.IntegerOp:
        scales = np.array([1, 1, *layer.scale], np.float32)
        settings = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return self._move(node, "Resize", None, scales, **settings)

    def _move(self, node: fx.Node, operator: str, *operands: Any, **attributes: Any) -> ir.IntegerOp:
        inputs, output = self._inputs(node), self._with_qparams_of_input(node)
        return ir.MoveOp(str(node.target), inputs, output, operator, operands, attributes)

    def flatten(self, node: fx.Node, layer: nn.Flatten) -> ir.IntegerOp:
        if not makes_rows(node):
            raise UnsupportedLayerError(
                f"layer {node.target!r} flattens only some dimensions; only [N, ...] to [N, features] can be exported"
            )
        return ir.FlattenOp(str(node.target), self._inputs(node), self._with_qparams_of_input(node))


def _plain(kind: type[ir.IntegerOp]) -> Callable[[_Lowering, fx.Node, Any], ir.IntegerOp]:
    """Return the lowering of a layer without settings."""
    return lambda lowering, node, layer: kind(str(node.target), lowering._inputs(node), lowering._output(node))


_LOWERINGS: dict[type[nn.Module], Callable[[_Lowering, fx.Node, Any], ir.IntegerOp]] = {
    QuantizedConv2d: _Lowering.convolution,
    QuantizedLinear: _Lowering.linear,
    QuantizedPReLU: _Lowering.prelu,
    nn.ReLU: _Lowering.clamp,
    nn.ReLU6: _Lowering.clamp,
    nn.Hardtanh: _Lowering.clamp,
    nn.Sigmoid: _plain(ir.SigmoidOp),
    nn.AvgPool2d: _Lowering.average_pool,
    QuantizedGlobalAveragePool: _plain(ir.GlobalAveragePoolOp),
    nn.MaxPool2d: _Lowering.max_pool,
    nn.Flatten: _Lowering.flatten,
    layers.Add: _Lowering.add,
    layers.Maximum: _Lowering.maximum,
    layers.Pad: _Lowering.pad,
    layers.Permute: _Lowering.permute,
    layers.Reshape: _Lowering.reshape,
    layers.Slice: _Lowering.slice,
    layers.UpsampleNearest: _Lowering.upsample,
    layers.Multiply: _plain(ir.MultiplyOp),
    layers.Concat: _Lowering.concat,
    QuantizedAffine: _Lowering.affine,
    layers.L2Normalize: _plain(ir.L2NormalizeOp),
}


class _ShapeRecorder(fx.Interpreter):
    """Interpreter that records the shape and dtype of each output; the shape of a non-tensor is ()."""

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.extra_traceback = False  # otherwise torch.fx appends lines to error messages
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.shapes[n.name] = tuple(getattr(result, "shape", ()))
        self.dtypes[n.name] = getattr(result, "dtype", torch.float32)
        return result


def value_name(node: fx.Node) -> str:
    """Return the name of the output value of ``node``."""
    # Node names have no colon, so a layer called "embedding" cannot collide with the output of that name.
    return f"{node.name}:0"


def _value_of(node: fx.Node, qparams: ir.TensorQParams | None) -> ir.Value:
    return ir.Value(value_name(node), qparams)


def _qparams_of(layer: Quantizer, node: fx.Node) -> ir.TensorQParams:
    if isinstance(layer, LSQFakeQuantize) and not layer.calibrated.item():
        raise ConfigError(NOT_CALIBRATED)
    scale, zero_point, *_ = layer.qparams()
    moved = shifts(zero_point)
    of_channels = tuple(moved.tolist()) if moved.any() else ()
    return ir.TensorQParams(layer.bits, float(scale), int((zero_point - moved)[0]), of_channels)


def _limits(clamp: fx.Node | None) -> ir.Clamp | None:
    return None if clamp is None else limits_of(cast(nn.Module, layer_of(clamp)))


def _weight(layer: QuantizedConv2d | QuantizedLinear) -> ir.Weight:
    quantizer = layer.weight_fake_quant
    offset = _int8(quantizer.offset) if bool(quantizer.offset.any()) else None
    integers, scale = _int8(quantizer.integers(layer.weight)), _float32(quantizer.exact_scale())
    return ir.Weight(integers, scale, quantizer.bits, offset, int(quantizer.stride))


def _int8(integers: Tensor) -> ir.Int8:
    return integers.to(torch.int8).cpu().numpy()


def _float32(tensor: Tensor) -> ir.Float32:
    return tensor.detach().float().cpu().numpy()


def _window(layer: nn.AvgPool2d | nn.MaxPool2d) -> dict[str, Any]:
    return {
        "kernel": pair_of(layer.kernel_size),
        "stride": pair_of(layer.stride),
        "padding": pair_of(layer.padding),
        "ceil_mode": layer.ceil_mode,
    }
