import re
import subprocess
import sys
import types
from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qface.deployment.runtime import OnnxEmbedder
from qface.errors import CheckpointError, ConfigError, DependencyError, QFaceError
from qface.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(crop=(0, 8, 112, 104), size=(112, 96), std=(128.0, 128.0, 128.0))


@pytest.fixture
def write(tmp_path):
    """Writes a network that averages each channel: [batch, 3, height, width] -> [batch, 3]."""

    def write(shape=("N", 3, 112, 112), preprocessing=None, dtype=TensorProto.FLOAT, name="mean.onnx"):
        value = helper.make_tensor_value_info
        nodes = [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["floats"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["embedding"]),
        ]
        graph = helper.make_graph(
            nodes,
            "mean",
            [value("images", dtype, shape)],
            [value("embedding", TensorProto.FLOAT, [shape[0], 3])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        if preprocessing is not None:
            helper.set_model_props(model, {"preprocessing": preprocessing})
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return write


def message(path, **settings):
    with pytest.raises(CheckpointError) as error:
        OnnxEmbedder(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("batch", ["N", 1, 2, 5, 8])
def test_computes_the_network_for_any_number_of_images(write, batch):
    images = torch.randn(5, 3, 112, 112)
    output = OnnxEmbedder(write((batch, 3, 112, 112)))(images)
    assert output.dtype == torch.float32
    assert torch.allclose(output, images.mean((2, 3)), atol=1e-6)


def test_takes_images_of_any_type_and_layout(write):
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64, requires_grad=True)
    for view in (images, images.to(memory_format=torch.channels_last), images.flip(-1)):
        output = OnnxEmbedder(write())(view)
        assert torch.allclose(output, images.float().mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_floats_and_bytes_reach_either_kind_of_file(write, batch, color):
    preprocessing = replace(PREPROCESSING, color=color, mean=(10.0, 20.0, 30.0))
    pixels = torch.randint(256, (5, 3, 112, 96)).byte()
    images = preprocessing.normalize(pixels)
    shape = (batch, 3, 112, 96)
    for kind, dtype, expected in (
        ("float32", TensorProto.FLOAT, images.mean((2, 3))),
        ("uint8", TensorProto.UINT8, pixels.float().mean((2, 3))),
    ):
        embedder = OnnxEmbedder(write(shape, preprocessing.to_json(), dtype), threads=1)
        assert embedder.input == kind
        assert torch.equal(embedder(images), embedder(pixels))
        assert torch.allclose(embedder(images), expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_comes_from_the_file(write):
    assert OnnxEmbedder(write()).preprocessing == Preprocessing()
    path = write(("N", 3, 112, 96), PREPROCESSING.to_json())
    assert OnnxEmbedder(path).preprocessing == PREPROCESSING


def test_provider_is_the_one_that_is_used(write):
    embedder = OnnxEmbedder(write(), providers=["CPUExecutionProvider"], threads=1)
    assert embedder.provider == "CPUExecutionProvider"
    assert embedder.runtime == "onnxruntime CPUExecutionProvider"


def test_default_provider_falls_back_quietly(write, capfd):
    embedder = OnnxEmbedder(write(preprocessing=PREPROCESSING.to_json(), shape=("N", 3, 112, 96)))
    assert embedder.provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert capfd.readouterr() == ("", "")


def test_unknown_provider_is_an_error(write):
    with pytest.raises(ConfigError, match="no AbacusExecutionProvider"):
        OnnxEmbedder(write(), providers=["AbacusExecutionProvider"])


def test_missing_and_damaged_files_are_errors(write, tmp_path):
    assert "there is no file" in message(tmp_path / "none.onnx")
    for damaged in (b"", b"hello", write().read_bytes()[:60]):
        (tmp_path / "damaged.onnx").write_bytes(damaged)
        assert re.search("cannot open|not a complete ONNX file", message(tmp_path / "damaged.onnx"))


def test_other_inputs_are_errors(write):
    assert "one float or uint8 input" in message(write(dtype=TensorProto.INT64))
    assert "one float or uint8 input" in message(write((3, 112, 112)))


def test_preprocessing_that_does_not_fit_is_an_error(write):
    assert "has an input of 112x96" in message(write(("N", 3, 112, 96), Preprocessing().to_json()))
    assert "use the output of Preprocessing.to_json" in message(write(preprocessing="{"))


def test_images_of_another_size_are_an_error_of_one_line(write):
    with pytest.raises(QFaceError, match=r"cannot embed images \[1, 3, 8, 8\]") as error:
        OnnxEmbedder(write())(torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(error.value)


def test_importing_does_not_import_onnxruntime():
    code = "import sys, qface.deployment.runtime, qface.evaluation; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_a_missing_or_broken_onnxruntime_is_told(state, write, monkeypatch):
    path = write()
    monkeypatch.setitem(sys.modules, "onnxruntime", None if state == "missing" else types.ModuleType("onnxruntime"))
    with pytest.raises(
        DependencyError, match=r"^onnxruntime is missing or broken \(.*pip install .* only one of the two"
    ):
        OnnxEmbedder(path)
