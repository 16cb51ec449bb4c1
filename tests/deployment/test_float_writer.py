"""A file in floats keeps the packed weights and embeds as the student does whose activations are not rounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qface
from qface.cli import main
from qface.data.folders import ImageFolder
from qface.deployment import OnnxEmbedder
from qface.deployment.float_writer import FLOAT_TARGETS
from qface.errors import ConfigError, ExportError
from qface.graph.layers import Add
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from tests.deployment.networks import Framed, calibrated, framed, prelu, seeded
from tests.deployment.test_exactness import EXACT, FRAME
from tests.networks import foreign_net, random_faces, tiny_face_net

Crops = Callable[..., Path]

PREPROCESSING = Preprocessing(crop=(0, 8, 112, 104), size=(112, 96), color="BGR")
UNPACKING = {"Mod", "Div", "Split", "Slice", "Reshape", "DequantizeLinear"}
TARGETS = sorted(FLOAT_TARGETS)


class Unit(nn.Module):
    """An embedding of length 1, as some networks return it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Framed(nn.MaxPool2d(4))
        self.prelu = prelu(0.5, 1.5, -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x))


@pytest.fixture(scope="module")
def student() -> fx.GraphModule:
    return calibrated(with_preprocessing(tiny_face_net(size=PREPROCESSING.size), PREPROCESSING), 6)


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(student: fx.GraphModule, target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qface.export(student, tmp_path_factory.mktemp(target) / "net.onnx", target=target)


@cache
def student_with(body: str) -> fx.GraphModule:
    return calibrated(framed(EXACT[body]), 6)


@cache
def student_of(build: Callable[..., nn.Module], bits: int) -> fx.GraphModule:
    preprocessing = Preprocessing(size=(48, 40), color="BGR", mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    return calibrated(with_preprocessing(build(size=preprocessing.size), preprocessing), bits)


def optimized(path: Path, folder: Path) -> onnx.GraphProto:
    """What onnxruntime leaves of a file on a CPU, before it changes layouts."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def assert_agrees(student: nn.Module, path: Path) -> None:
    agreement = qface.verify(student, path, random_faces(16, seed=3))
    assert agreement.agrees and agreement.images == 16
    assert not agreement.layers
    assert agreement.mean_cosine > 0.99999


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize("body", EXACT)
def test_every_operation_agrees(body: str, kind: str, target: str, tmp_path: Path) -> None:
    student = student_with(body)
    assert_agrees(student, qface.export(student, tmp_path / "net.onnx", input=kind, target=target))


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize("build", [tiny_face_net, foreign_net])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_networks_agree_at_any_bits(
    build: Callable[..., nn.Module], bits: int, kind: str, target: str, tmp_path: Path
) -> None:
    student = student_of(build, bits)
    assert_agrees(student, qface.export(student, tmp_path / "net.onnx", input=kind, target=target))


def test_embeddings_are_normalized_in_float32(target: str, tmp_path: Path) -> None:
    student = calibrated(with_preprocessing(seeded(Unit), FRAME))
    path = qface.export(student, tmp_path / "net.onnx", target=target)
    assert_agrees(student, path)
    lengths = OnnxEmbedder(path, threads=1)(FRAME(random_faces(4))).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(4), rtol=1e-6)


def test_file_is_valid_and_says_what_it_is_for(target: str, path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    assert metadata["target"] == OnnxEmbedder(path).target == target
    assert {"preprocessing", "provenance", "qface", "verified", "input"} < metadata.keys()
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [
        TensorProto.FLOAT,
        TensorProto.FLOAT,
    ]


@pytest.mark.parametrize("weight_format", ["packed", "int8"])
def test_weights_lie_in_it_as_in_the_file_for_cpus(
    weight_format: str, student: fx.GraphModule, target: str, tmp_path: Path
) -> None:
    files = {
        each: qface.export(student, tmp_path / f"{each}.onnx", weight_format, target=each) for each in ("cpu", target)
    }
    weights = [qface.measure_size(file).of_kind("weight") for file in files.values()]
    assert weights[1].bytes > 3000
    assert set(weights[1].entries) <= set(weights[0].entries)
    scales = {entry.name for entry in qface.measure_size(files[target]).of_kind("scale").entries}
    assert {f"{entry.name}_scale" for entry in weights[1].entries} <= scales
    assert files[target].stat().st_size < 1.1 * files["cpu"].stat().st_size


@pytest.mark.parametrize("weight_format", ["packed", "int8"])
def test_nothing_of_the_unpacking_is_left_at_run_time(
    weight_format: str, student: fx.GraphModule, target: str, tmp_path: Path
) -> None:
    graph = optimized(qface.export(student, tmp_path / "net.onnx", weight_format, target=target), tmp_path)
    assert not UNPACKING & {node.op_type for node in graph.node}
    assert not [
        tensor.name for tensor in graph.initializer if tensor.data_type in (TensorProto.INT8, TensorProto.INT32)
    ]


def test_multiplications_are_in_the_type_of_the_target(target: str, path: Path) -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    multiplications = [node for node in inferred.node if node.op_type in ("Conv", "Gemm", "PRelu")]
    assert len(multiplications) > 5
    for node in multiplications:
        assert {types[name] for name in (*node.input, *node.output)} == {
            TensorProto.FLOAT16 if target == "cuda" else TensorProto.FLOAT
        }


def test_float32_casts_nothing_at_run_time(student: fx.GraphModule, tmp_path: Path) -> None:
    path = qface.export(student, tmp_path / "net.onnx", target="float32")
    assert "Cast" not in {node.op_type for node in optimized(path, tmp_path).node}


def test_sums_that_differ_only_in_bits_are_computed_once(target: str, tmp_path: Path) -> None:
    student = calibrated(framed(EXACT["sums that convolutions read"]), 4)
    graph = optimized(qface.export(student, tmp_path / "net.onnx", target=target), tmp_path)
    assert sum(isinstance(layer, Add) for layer in student.modules()) == 10
    of_affine_maps = 2
    assert len([node for node in graph.node if node.op_type == "Add"]) == 6 + of_affine_maps


def with_a_changed_bias(file: Path) -> None:
    model = onnx.load(file)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv2.bias"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.int32(20000), tensor.name))
    onnx.save(model, file)


def test_a_file_that_computes_something_else_is_found(
    student: fx.GraphModule, path: Path, crops: Crops, tmp_path: Path
) -> None:
    saved, file = tmp_path / "student.safetensors", tmp_path / "net.onnx"
    qface.save(student, saved)
    file.write_bytes(path.read_bytes())
    arguments = ["verify", str(saved), str(file), "--images", str(crops({"Ann": 4}))]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    with_a_changed_bias(file)
    assert CliRunner().invoke(main, arguments).exit_code == 1


def test_the_file_of_another_network_is_refused(path: Path) -> None:
    other = calibrated(with_preprocessing(tiny_face_net(dim=4, size=PREPROCESSING.size), PREPROCESSING), 6)
    with pytest.raises(ExportError, match="not exported from this network"):
        qface.verify(other, path, random_faces(4))


def test_a_network_beyond_the_range_of_halves_is_for_float32_only(tmp_path: Path) -> None:
    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    with torch.no_grad():
        model.get_parameter("stem.weight").mul_(1e6)
    student = calibrated(model, 6)
    with pytest.raises(ExportError, match="target cpu"):
        qface.export(student, tmp_path / "net.onnx", target="cuda")
    assert not list(tmp_path.iterdir())
    assert_agrees(student, qface.export(student, tmp_path / "net.onnx", target="float32"))


def test_other_targets_and_float_networks_are_refused(student: fx.GraphModule, target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target must be one of 'cpu', 'cuda', 'float32'"):
        qface.export(student, tmp_path / "net.onnx", target="tpu")
    with pytest.raises(ConfigError, match="students only"):
        qface.export(tiny_face_net(), tmp_path / "net.onnx", target=target)
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_a_target(student: fx.GraphModule, target: str, tmp_path: Path) -> None:
    qface.save(student, tmp_path / "student.safetensors")
    arguments = ["export", str(tmp_path / "student.safetensors"), "-o", str(tmp_path / "net.onnx")]
    result = CliRunner().invoke(main, [*arguments, "--target", target, "--input", "uint8"])
    assert result.exit_code == 0, result.output
    embedder = OnnxEmbedder(tmp_path / "net.onnx")
    assert (embedder.target, embedder.input) == (target, "uint8")
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "net.onnx"), "--runs", "1", "--json"])
    assert json.loads(result.stdout)["rows"][0]["median_ms"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_on_a_gpu_it_agrees_too(kind: str, student: fx.GraphModule, tmp_path: Path) -> None:
    path = qface.export(student, tmp_path / "net.onnx", input=kind, target="cuda")
    session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    images = PREPROCESSING(random_faces(16, seed=3))
    on_gpu = OnnxEmbedder(path, providers=["CUDAExecutionProvider"])
    assert on_gpu.provider == "CUDAExecutionProvider"
    on_cpu = OnnxEmbedder(path, providers=["CPUExecutionProvider"])
    assert F.cosine_similarity(on_gpu(images), on_cpu(images)).min() > 0.9999
    assert_agrees(student, path)


@pytest.mark.faces
def test_real_network_agrees(target: str, faces: Path, mobilefacenet_file: Path, tmp_path: Path) -> None:
    student = qface.load(mobilefacenet_file)
    path = qface.export(student, tmp_path / "net.onnx", target=target)
    crops = ImageFolder(faces / "data" / "lfw", identities="second-half").read(range(32))
    agreement = qface.verify(student, path, crops)
    assert agreement.agrees
    assert path.stat().st_size < 1e6
    assert not UNPACKING & {node.op_type for node in optimized(path, tmp_path).node}
    images = preprocessing_of(student)(crops)
    assert OnnxEmbedder(path, threads=1)(images).isfinite().all()
