"""The integer graph says what the student computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from qface.deployment import IntegerGraph, lower
from qface.deployment.graph import Add, Affine, Convolution, Flatten, Grid, Linear, MaxPool, PRelu, QuantizeImage
from qface.errors import ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import LayerBits, QuantizationConfig, set_observers
from qface.quantization.layers import Quantizer
from tests.deployment.networks import CHANNELS, Sum, calibrated, framed, prelu
from tests.networks import tiny_face_net

PREPROCESSING = Preprocessing(size=(32, 32))


def student_of(bits: int | QuantizationConfig) -> fx.GraphModule:
    return calibrated(with_preprocessing(tiny_face_net(size=PREPROCESSING.size), PREPROCESSING), bits)


def quantizers(student: fx.GraphModule) -> list[Quantizer]:
    """Those of activations, in the order they run."""
    layers = [student.get_submodule(str(node.target)) for node in student.graph.nodes if node.op == "call_module"]
    return [layer for layer in layers if isinstance(layer, Quantizer)]


def grids(graph: IntegerGraph) -> list[Grid]:
    """Those that are not taken over from an input."""
    return [
        operation.output.grid
        for operation in graph.operations
        if operation.output.grid is not None and not isinstance(operation, (MaxPool, Flatten))
    ]


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_grids_are_those_of_the_quantizers(bits: int) -> None:
    student = student_of(bits)
    found = grids(lower(student))
    for grid, quantizer in zip(found, quantizers(student), strict=True):
        scale, zero_point = quantizer.tensors()
        assert grid == Grid(quantizer.bits, float(scale), int(zero_point))
        assert grid.low <= grid.zero_point < 256 == grid.low + 2**grid.bits
    assert {grid.bits for grid in found} == {bits, 8}


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_what_multiplications_read_has_the_width_asked_for(bits: int) -> None:
    for operation in lower(student_of(bits)).operations:
        if isinstance(operation, (Convolution, Linear)):
            (value,) = operation.inputs
            assert value.grid is not None and value.grid.bits == (8 if operation.name == "conv" else bits)
            assert operation.weight.bits == bits
            assert np.abs(operation.weight.integers.astype(int)).max() <= 2 ** (bits - 1)


def test_widths_of_single_layers_count() -> None:
    config = QuantizationConfig(overrides={"fc": LayerBits(weight=3, activation=4)})
    layers = {operation.name: operation for operation in lower(student_of(config)).operations}
    fc, other = layers["fc"], layers["block1.conv2"]
    assert isinstance(fc, Linear) and isinstance(other, Convolution)
    assert (fc.weight.bits, fc.inputs[0].grid.bits) == (3, 4)  # type: ignore[union-attr]
    assert (other.weight.bits, other.inputs[0].grid.bits) == (6, 6)  # type: ignore[union-attr]


def test_every_value_is_made_before_it_is_read_and_only_once() -> None:
    graph = lower(student_of(4))
    made = {graph.images.name}
    for operation in graph.operations:
        assert {value.name for value in operation.inputs} <= made
        assert operation.output.name not in made
        made.add(operation.output.name)
    assert graph.embedding.name in made
    assert graph.embedding.grid is None
    assert (graph.dimensions, graph.preprocessing) == (16, PREPROCESSING)


def test_operations_follow_the_layers() -> None:
    kinds = [type(operation) for operation in lower(student_of(4)).operations]
    block = [Affine, Convolution, PRelu, Convolution, Add]
    assert kinds == [QuantizeImage, Convolution, PRelu, MaxPool, *block, *block, Affine, Flatten, Linear]


def test_geometry_and_clamps_are_taken_over() -> None:
    def body() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(CHANNELS, 16, (3, 2), (1, 2), (2, 1), (2, 1), 4), nn.ReLU6(), nn.Conv2d(16, 4, 1)
        )

    layers = {operation.name: operation for operation in lower(calibrated(framed(body))).operations}
    first, second = layers["body.0"], layers["body.2"]
    assert isinstance(first, Convolution) and isinstance(second, Convolution)
    assert (first.stride, first.padding, first.dilation, first.groups) == ((1, 2), (2, 1), (2, 1), 4)
    assert first.weight.integers.shape == (16, 2, 3, 2)
    assert (first.clamp, second.clamp) == ((0.0, 6.0), None)
    assert "body.1" not in layers


def test_slopes_stand_for_those_of_the_student() -> None:
    slopes = (0.25, -0.5, 1.5)
    layers = {operation.name: operation for operation in lower(calibrated(framed(lambda: prelu(*slopes)))).operations}
    layer = layers["body"]
    assert isinstance(layer, PRelu)
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
    with pytest.raises(ConfigError, match=r"qface\.quantize"):
        lower(fx.symbolic_trace(tiny_face_net()))


def test_a_convolution_with_two_readers_is_not_clamped() -> None:
    layers = {op.name: op for op in lower(calibrated(framed(lambda: Sum(nn.ReLU6(), nn.ReLU())))).operations}
    stem = layers["stem"]
    assert isinstance(stem, Convolution) and stem.clamp is None
    assert {"body.left", "body.right"} <= set(layers)
