"""Find out whether onnxruntime's int8 kernels saturate on this processor.

x86 processors without VNNI add two uint8 x int8 products in 16 bits, which saturates with 8-bit weights. onnxruntime
does not say which kernels it chose, so three small layers are run and compared with exact integers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qface.onnxruntime_import import import_onnxruntime

__all__ = ["int8_saturates", "saturation_probe"]

_CHANNELS, _SIDE = 64, 8
_KERNELS = {"dense": (1, 1), "wide": (1, 3), "depthwise": (_CHANNELS, 3)}  # groups, kernel size
_OPSET = 17


@cache
def int8_saturates() -> bool:
    """Return True if 8-bit weights need onnxruntime's exact mode on this processor."""
    model, images, expected = saturation_probe()
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return not np.array_equal(session.run(None, {"images": images})[0], expected)


def saturation_probe() -> tuple[ModelProto, npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return a model of three layers with maximal products, its input, and its output if no kernel saturates.

    All inputs are 255 and all weights 127 or -128, in pairs whose products share their sign.
    """
    images = np.full((1, _CHANNELS, _SIDE, _SIDE), 255, np.uint8)
    nodes, tensors, expected = [], _shared_tensors(), []
    for name, (groups, size) in _KERNELS.items():
        weights = _weights(groups, size)
        sums = 255 * weights.sum(axis=(1, 2, 3), dtype=np.int64)
        scale = np.abs(sums).max() / 100
        tensors += [(f"{name}.weight", weights), (f"{name}.scale", np.float32(scale))]
        inputs = ["images", "one", "zero", f"{name}.weight", "one", "int8_zero", f"{name}.scale", "middle"]
        nodes.append(helper.make_node("QLinearConv", inputs, [name], group=groups, kernel_shape=[size, size]))
        nodes.append(helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceMean", [f"{name}.float"], [f"{name}.mean"], axes=[2, 3], keepdims=0))
        expected.append((128 + np.round(sums / scale)).astype(np.float32))
    nodes.append(helper.make_node("Concat", [f"{name}.mean" for name in _KERNELS], ["output"], axis=1))
    graph = helper.make_graph(
        nodes,
        "saturation",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, images.shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, len(_KERNELS) * _CHANNELS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    return model, images, np.concatenate(expected)[None]


def _shared_tensors() -> list[tuple[str, npt.NDArray[np.generic] | np.generic]]:
    return [("one", np.float32(1)), ("zero", np.uint8(0)), ("int8_zero", np.int8(0)), ("middle", np.uint8(128))]


def _weights(groups: int, size: int) -> npt.NDArray[np.int8]:
    """Return weights [_CHANNELS, _CHANNELS / groups, size, size]: 127 in even output channels and -128 in odd ones."""
    weights = np.empty((_CHANNELS, _CHANNELS // groups, size, size), np.int8)
    weights[0::2], weights[1::2] = 127, -128
    return weights
