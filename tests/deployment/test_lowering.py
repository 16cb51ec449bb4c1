"""The integer graph says what the student computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from qface.deployment import IntegerGraph, lower
from qface.deployment.integer_graph import (
    AddOp,
    AffineOp,
    ConvolutionOp,
    FlattenOp,
    LinearOp,
    MaxPoolOp,
    PReluOp,
    QuantizeImageOp,
    TensorQParams,
)
from qface.errors import ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import LayerBits, QuantizationConfig, set_observers
from qface.quantization.quantized_layers import Quantizer
from tests.deployment.networks import CHANNELS, Sum, calibrated, framed, prelu
from tests.networks import tiny_face_net

PREPROCESSING = Preprocessing(size=(32, 32))


def student_of(bits: int | QuantizationConfig) -> fx.GraphModule:
    return calibrated(with_preprocessing(tiny_face_net(size=PREPROCESSING.size), PREPROCESSING), bits)


def quantizers(student: fx.GraphModule) -> list[Quantizer]:
    """Those of activations, in the order they run."""
    layers = [student.get_submodule(str(node.target)) for node in student.graph.nodes if node.op == "call_module"]
    return [layer for layer in layers if isinstance(layer, Quantizer)]


def output_qparams(graph: IntegerGraph) -> list[TensorQParams]:
    """Those that are not taken over from an input."""
    return [
        operation.output.qparams
        for operation in graph.operations
        if operation.output.qparams is not None and not isinstance(operation, (MaxPoolOp, FlattenOp))
    ]


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_qparams_are_those_of_the_quantizers(bits: int) -> None:
    student = student_of(bits)
    found = output_qparams(lower(student))
    for qparams, quantizer in zip(found, quantizers(student), strict=True):
        scale, zero_point, *_ = quantizer.qparams()
        assert qparams == TensorQParams(quantizer.bits, float(scale), int(zero_point[0]))
        assert qparams.quant_min <= qparams.zero_point < 256 == qparams.quant_min + 2**qparams.bits
    assert {qparams.bits for qparams in found} == {bits, 8}


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_what_multiplications_read_has_the_bits_asked_for(bits: int) -> None:
    for operation in lower(student_of(bits)).operations:
        if isinstance(operation, (ConvolutionOp, LinearOp)):
            (value,) = operation.inputs
            assert value.qparams is not None and value.qparams.bits == (8 if operation.name == "conv" else bits)
            assert operation.weight.bits == bits
            assert np.abs(operation.weight.integers.astype(int)).max() <= 2 ** (bits - 1)


def test_bits_of_single_layers_count() -> None:
    config = QuantizationConfig(overrides={"fc": LayerBits(weight=3, activation=4)})
    layers = {operation.name: operation for operation in lower(student_of(config)).operations}
    fc, other = layers["fc"], layers["block1.conv2"]
    assert isinstance(fc, LinearOp) and isinstance(other, ConvolutionOp)
    assert (fc.weight.bits, fc.inputs[0].qparams.bits) == (3, 4)  # type: ignore[union-attr]
    assert (other.weight.bits, other.inputs[0].qparams.bits) == (6, 6)  # type: ignore[union-attr]


def test_every_value_is_made_before_it_is_read_and_only_once() -> None:
    graph = lower(student_of(4))
    made = {graph.images.name}
    for operation in graph.operations:
        assert {value.name for value in operation.inputs} <= made
        assert operation.output.name not in made
        made.add(operation.output.name)
    assert graph.embedding.name in made
    assert graph.embedding.qparams is None
    assert (graph.dimensions, graph.preprocessing) == (16, PREPROCESSING)


def test_operations_follow_the_layers() -> None:
    kinds = [type(operation) for operation in lower(student_of(4)).operations]
    block = [AffineOp, ConvolutionOp, PReluOp, ConvolutionOp, AddOp]
    assert kinds == [QuantizeImageOp, ConvolutionOp, PReluOp, MaxPoolOp, *block, *block, AffineOp, FlattenOp, LinearOp]


def test_geometry_and_clamps_are_taken_over() -> None:
    def body() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(CHANNELS, 16, (3, 2), (1, 2), (2, 1), (2, 1), 4), nn.ReLU6(), nn.Conv2d(16, 4, 1)
        )

    layers = {operation.name: operation for operation in lower(calibrated(framed(body))).operations}
    first, second = layers["body.0"], layers["body.2"]
    assert isinstance(first, ConvolutionOp) and isinstance(second, ConvolutionOp)
    assert (first.stride, first.padding, first.dilation, first.groups) == ((1, 2), (2, 1), (2, 1), 4)
    assert first.weight.integers.shape == (16, 2, 3, 2)
    assert (first.clamp, second.clamp) == ((0.0, 6.0), None)
    assert "body.1" not in layers


def test_slopes_stand_for_those_of_the_student() -> None:
    slopes = (0.25, -0.5, 1.5)
    layers = {operation.name: operation for operation in lower(calibrated(framed(lambda: prelu(*slopes)))).operations}
    layer = layers["body"]
    assert isinstance(layer, PReluOp)
    wanted = np.array(slopes * 3)[:CHANNELS]
    assert np.abs(layer.slopes * layer.slope_scale - wanted).max() <= layer.slope_scale / 2 + 1e-7


def test_lowering_changes_nothing_even_while_ranges_are_observed() -> None:
    student = student_of(4).train()
    set_observers(student, enabled=True)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    lower(student)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_float_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="this network is not quantized; give a student"):
        lower(fx.symbolic_trace(tiny_face_net()))


def test_a_convolution_with_two_readers_is_not_clamped() -> None:
    layers = {op.name: op for op in lower(calibrated(framed(lambda: Sum(nn.ReLU6(), nn.ReLU())))).operations}
    stem = layers["stem"]
    assert isinstance(stem, ConvolutionOp) and stem.clamp is None
    assert {"body.left", "body.right"} <= set(layers)
