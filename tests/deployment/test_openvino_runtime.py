"""A file computes in OpenVINO what its student computes, whatever the form of its weights."""

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from torch import fx, nn

import qface
from qface.cli import main
from qface.deployment.openvino_runtime import OpenVinoEmbedder
from qface.errors import ConfigError, DependencyError, QFaceError
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.networks import SIDE, Framed, Sum, calibrated
from tests.networks import random_faces, tiny_face_net

Crops = Callable[..., Path]


@pytest.fixture(scope="module")
def student() -> fx.GraphModule:
    return calibrated(with_preprocessing(tiny_face_net(size=(32, 32)), Preprocessing(size=(32, 32))), 6)


@pytest.fixture
def file(student: fx.GraphModule, tmp_path: Path) -> Path:
    return qface.export(student, tmp_path / "net.onnx", input="uint8")


def operators_in_openvino(file: Path) -> list[str]:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(file), "CPU")
    return [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ordered_ops()]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_nothing_of_the_unpacking_is_left(bits: int, tmp_path: Path) -> None:
    network = calibrated(with_preprocessing(Framed(nn.Identity()), Preprocessing(size=(SIDE, SIDE))), bits)
    operators = {
        form: sorted(operators_in_openvino(qface.export(network, tmp_path / f"{form}.onnx", form)))
        for form in ("packed", "int8")
    }
    assert operators["packed"] == operators["int8"]


@pytest.mark.parametrize("weight_format", ["packed", "int8"])
def test_embeddings_are_those_of_the_student(weight_format: str, student: fx.GraphModule, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    file = qface.export(student, tmp_path / "net.onnx", weight_format, input="uint8")
    agreement = qface.verify(student, file, random_faces(70, seed=5), runtime="openvino")
    assert agreement.agrees
    assert (agreement.images, agreement.layers, agreement.runtime) == (70, (), "openvino")
    assert agreement.mean_cosine > 0.995


def test_a_convolution_is_rounded_before_a_sum(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    block = Sum(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    network = calibrated(with_preprocessing(Framed(block), Preprocessing(size=(SIDE, SIDE))), 4)
    file = qface.export(network, tmp_path / "net.onnx", input="uint8")
    assert qface.verify(network, file, random_faces(32), runtime="openvino").mean_cosine > 0.9999


def test_another_file_does_not_agree(student: fx.GraphModule, file: Path) -> None:
    pytest.importorskip("openvino")
    model = onnx.load(file)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv2.weight_scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scale), scale.name))
    onnx.save(model, file)
    assert not qface.verify(student, file, random_faces(8), runtime="openvino").agrees


def test_the_command_line_takes_a_runtime(student: fx.GraphModule, file: Path, crops: Crops) -> None:
    pytest.importorskip("openvino")
    qface.save(student, file.with_suffix(".safetensors"))
    arguments = ["verify", str(file.with_suffix(".safetensors")), str(file), "--images", str(crops({"anna": 2}))]
    result = CliRunner().invoke(main, [*arguments, "--runtime", "openvino"])
    assert result.exit_code == 0, result.output
    assert "agree" in result.output


def test_images_of_another_size_are_refused(file: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(QFaceError, match="cannot embed images"):
        OpenVinoEmbedder(file)(random_faces(1)[..., :56])


def test_without_openvino_the_message_says_what_to_install(
    student: fx.GraphModule, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyError, match=r"pip install 'qface\[bench\]'$"):
        qface.verify(student, file, random_faces(2), runtime="openvino")


def test_an_unknown_runtime_is_refused(student: fx.GraphModule, file: Path) -> None:
    with pytest.raises(ConfigError, match="runtime must be one of 'onnxruntime', 'openvino'"):
        qface.verify(student, file, random_faces(2), runtime="tensorrt")
