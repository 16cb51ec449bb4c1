"""Quantization plan: which layers compute in integers, which in float, and their multiply-adds."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from torch import fx, nn

from qface.graph.aten import operator_name
from qface.graph.edit import propagate_shapes
from qface.graph.queries import SYMBOLIC_FUNCTIONS, input_of, is_shape_only, layer_of, shape_of
from qface.preprocessing import example_input
from qface.quantization.fake_quantize import LSQFakeQuantize
from qface.quantization.placement import computes_in_float
from qface.quantization.quantized_layers import QuantizedAffine, Quantizer, WeightedLayer, is_quantizer
from qface.results import Result

__all__ = ["LayerPlan", "QuantizationPlan", "count_activation_bits", "plan_of", "unrounded"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a student.

    Args:
        name: name in the network.
        kind: class of the layer, or name of the operator.
        integer: True if it computes in integers.
        weight_bits: bits of its weight; None without a weight or with a float weight.
        multiply_adds: multiply-adds per image.
    """

    name: str
    kind: str
    integer: bool
    weight_bits: int | None
    multiply_adds: int


@dataclass(frozen=True, repr=False)
class QuantizationPlan(Result):
    """All layers of a student that compute new values, in execution order.

    Args:
        layers: the layers.

    Example:
        >>> import qface
        >>> from qface.models import MobileFaceNet
        >>> plan = qface.inspect(MobileFaceNet())
        >>> plan.integer_share
        1.0
        >>> plan.float_layers
        ()
    """

    layers: tuple[LayerPlan, ...]

    @property
    def float_layers(self) -> tuple[LayerPlan, ...]:
        """The layers that compute in float, between a dequantize and a quantize."""
        return tuple(layer for layer in self.layers if not layer.integer)

    @property
    def integer_share(self) -> float:
        """Fraction of the multiply-adds in integer kernels, 0..1."""
        total = sum(layer.multiply_adds for layer in self.layers)
        return sum(layer.multiply_adds for layer in self.layers if layer.integer) / max(total, 1)

    def _key_figures(self) -> Mapping[str, object]:
        return {"layers": len(self.layers), "integer_share": self.integer_share}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return {"integer_share": self.integer_share, "layers": [asdict(layer) for layer in self.layers]}

    @property
    def summary(self) -> str:
        """One line with the number of integer layers and the kinds of float layers."""
        total = len(self.layers)
        kinds = Counter(layer.kind for layer in self.float_layers)
        left = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        line = f"{total - len(self.float_layers)} of {total} layers and {self.integer_share:.1%} of the multiply-adds"
        return f"{line} are integers; in float: {left or 'nothing'}"


def plan_of(student: fx.GraphModule) -> QuantizationPlan:
    """Return the plan of ``student``, which is not changed.

    Args:
        student: the result of :func:`qface.quantize`, calibrated or not.
    """
    trial = unrounded(student)
    propagate_shapes(trial, example_input(student))
    return QuantizationPlan(tuple(_layer_plan(node) for node in trial.graph.nodes if _computes_values(node)))


def unrounded(model: ModuleT) -> ModuleT:
    """Return a copy of ``model`` in eval mode with LSQ fake quantization off.

    The copy runs before calibration too.

    Args:
        model: a student, calibrated or not.
    """
    trial = copy.deepcopy(model).eval()
    for layer in trial.modules():
        if isinstance(layer, LSQFakeQuantize):
            layer.disable_fake_quant()
    return trial


def count_activation_bits(student: fx.GraphModule) -> dict[int, int]:
    """Count the activation tensors of ``student`` per number of bits, image included.

    Args:
        student: the result of :func:`qface.quantize`.

    Returns:
        Counts by bits, in ascending order of bits.

    Example:
        >>> import qface
        >>> from qface.models import MobileFaceNet
        >>> count_activation_bits(qface.quantize(MobileFaceNet(), bits=4))
        {4: 49, 8: 58}
    """
    quantizers = [layer_of(node) for node in student.graph.nodes if is_quantizer(node)]
    bits = Counter(cast(Quantizer, quantizer).bits for quantizer in quantizers)
    return dict(sorted(bits.items()))


def _computes_values(node: fx.Node) -> bool:
    if node.op not in ("call_module", "call_function") or node.target in SYMBOLIC_FUNCTIONS:
        return False
    return not is_quantizer(node) and not is_shape_only(node) and bool(shape_of(node))


def _layer_plan(node: fx.Node) -> LayerPlan:
    layer = layer_of(node)
    integer = not computes_in_float(node)
    if isinstance(layer, QuantizedAffine):
        integer = layer.quant_context.complete
    kind = operator_name(node.target) if layer is None else type(layer).__name__.removeprefix("Quantized")
    bits = layer.weight_bits if isinstance(layer, WeightedLayer) else None
    name = node.name if layer is None else str(node.target)
    return LayerPlan(name, kind, integer, bits, _multiply_adds(node, layer))


def _multiply_adds(node: fx.Node, layer: nn.Module | None) -> int:
    """Return the multiply-adds per image; shapes are for a batch of two."""
    values = math.prod(shape_of(node)) // 2
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return values * layer.weight[0].numel()
    if node.op != "call_function":
        return 0
    name = operator_name(node.target)
    if name in ("matmul", "bmm", "mm"):
        return values * shape_of(input_of(node))[-1]
    if name == "scaled_dot_product_attention":  # queries x keys, then attention weights x values
        return values * 2 * shape_of(node.all_input_nodes[1])[-2]
    return 0
