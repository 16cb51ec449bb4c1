from typing import get_args

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from qface.choices import WeightFormatName
from qface.deployment.integer_graph import Weight
from qface.deployment.nodes import IR_VERSION, OPSET
from qface.deployment.weight_formats import WEIGHT_FORMATS, WeightFormat, make_weight_format
from qface.quantization.fake_quantize import offset_range

Weights = dict[str, npt.NDArray[np.int8]]


def weights(bits: int, *shapes: tuple[int, ...]) -> Weights:
    """All integers of ``bits`` bits, in random order."""
    random = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return {
        f"layer{number}.weight": random.integers(low, high, shape, np.int8, endpoint=True)
        for number, shape in enumerate(shapes)
    }


def stored(weight_format: str, bits: dict[str, int], integers: Weights) -> ModelProto:
    """A model that gives ``integers`` back out of ``weight_format``."""
    content = make_weight_format(weight_format)
    for name, values in integers.items():
        content.add(name, Weight(values, np.ones(len(values), np.float32), bits[name]))
    return model_of(content, integers)


def model_of(content: WeightFormat, integers: Weights) -> ModelProto:
    """A model that gives ``integers`` back out of ``content``."""
    initializers, nodes = content.contents()
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", TensorProto.INT8, values.shape)
        for name, values in integers.items()
    ]
    copies = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in integers]
    graph = helper.make_graph([*nodes, *copies], "stored", [], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def assert_given_back(model: ModelProto, integers: Weights) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for out, values in zip(session.run(None, {}), integers.values(), strict=True):
        assert out.dtype == np.int8
        np.testing.assert_array_equal(out, values)


def test_every_choice_has_a_format() -> None:
    assert set(WEIGHT_FORMATS) == set(get_args(WeightFormatName))


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_onnxruntime_finds_every_integer(weight_format: str, bits: int) -> None:
    integers = weights(bits, (64, 32, 3, 3), (7, 5, 1, 1), (16, 1, 3, 3), (13, 11))
    assert_given_back(stored(weight_format, dict.fromkeys(integers, bits), integers), integers)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@given(
    bits=st.integers(2, 6),
    stride=st.integers(1, 2),
    shape=st.sampled_from([(6, 4), (5, 3, 3, 3), (1, 1, 1, 1)]),
    seed=st.integers(0, 2**16),
)
def test_onnxruntime_finds_integers_with_strides_and_offsets(
    weight_format: str, bits: int, stride: int, shape: tuple[int, ...], seed: int
) -> None:
    low, high = offset_range(bits, stride)
    random = np.random.default_rng(seed)
    offset = random.integers(low, high, shape[0], np.int8, endpoint=True)
    codes = weights(bits, shape)["layer0.weight"]
    integers = stride * codes + offset.reshape(-1, *(1,) * (len(shape) - 1))
    weight = Weight(integers, np.ones(len(codes), np.float32), bits, offset, stride)
    np.testing.assert_array_equal(weight.codes, codes)
    content = make_weight_format(weight_format)
    content.add("odd", weight)
    content.add("plain", Weight(codes, np.ones(len(codes), np.float32), bits))
    assert_given_back(model_of(content, {"odd": integers, "plain": codes}), {"odd": integers, "plain": codes})


@given(st.lists(st.tuples(st.integers(2, 8), st.integers(1, 40)), min_size=1, max_size=4))
def test_layers_of_any_size_and_bits_lie_side_by_side(layers: list[tuple[int, int]]) -> None:
    integers = {f"layer{place}": weights(bits, (size,))["layer0.weight"] for place, (bits, size) in enumerate(layers)}
    bits = {f"layer{place}": bits for place, (bits, _) in enumerate(layers)}
    assert_given_back(stored("packed", bits, integers), integers)


def test_many_weights_lie_in_several_buffers() -> None:
    integers = weights(3, (5, 10**6), (1001,), (4, 10**6), (9 * 10**6,), (3,))
    model = stored("packed", dict.fromkeys(integers, 3), integers)
    planes = {tensor.name for tensor in model.graph.initializer if "_plane" in tensor.name}
    assert planes == {f"{buffer}_plane{place}" for buffer in ("w3", "w3.1", "w3.2", "w3.3") for place in range(3)}
    assert_given_back(model, integers)
