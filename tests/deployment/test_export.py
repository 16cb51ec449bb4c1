"""What stands in an exported file, and what happens where none can be written."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn

import qface
from qface.deployment import OnnxEmbedder
from qface.errors import ConfigError, ExportError, QFaceError, UnsupportedLayerError
from qface.graph import capture
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of
from qface.quantization import LayerBits, QuantizationConfig, calibrate, quantize
from qface.quantization.quantized_layers import WeightedLayer
from tests.deployment.integers import assert_exact, optimized_operators, read_by_multiplications, session
from tests.deployment.networks import CHANNELS, SIDE, Applied, Framed, Sum, calibrated, framed, seeded
from tests.networks import TinyFaceNet, foreign_net, random_faces, tiny_face_net

Crops = Callable[..., Path]

PREPROCESSING = Preprocessing(crop=(0, 8, 112, 104), size=(32, 28), color="BGR", std=(128.0, 128.0, 128.0))


def tiny(bits: int | QuantizationConfig = 4) -> fx.GraphModule:
    return calibrated(captured(), bits)


@cache
def captured() -> fx.GraphModule:
    """The layers of :func:`network`, found once for all its students."""
    return capture(network())


def network() -> TinyFaceNet:
    return with_preprocessing(tiny_face_net(size=PREPROCESSING.size), PREPROCESSING)


@pytest.fixture(scope="module")
def student() -> fx.GraphModule:
    return tiny()


@pytest.fixture(scope="module")
def path(student: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    assert qface.export(student, path) == path
    return path


def props(path: Path) -> dict[str, str]:
    return {prop.key: prop.value for prop in onnx.load(path).metadata_props}


def signature(path: Path) -> list[tuple[str, list[object]]]:
    graph = onnx.load(path).graph
    return [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
    ]


# ---- the file of a student


def test_file_is_valid_for_runtimes_of_the_last_years(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10


def test_file_says_what_it_reads_and_where_it_comes_from(path: Path, student: fx.GraphModule) -> None:
    assert signature(path) == [("images", ["batch", 3, 32, 28]), ("embedding", ["batch", 16])]
    assert Preprocessing.from_json(props(path)["preprocessing"]) == PREPROCESSING
    assert json.loads(props(path)["provenance"]) == list(provenance_of(student))
    assert [step["step"] for step in json.loads(props(path)["provenance"])] == ["quantize", "calibrate"]
    assert props(path)["qface"] == qface.__version__


def test_nodes_are_called_after_their_layers_once(path: Path) -> None:
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node if node.name]
    assert len(names) == len(set(names))
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "Add", "Max", "Clip", "MaxPool") and not node.output[0].startswith("w4_"):
            assert re.fullmatch(rf".+/{node.op_type}(_\d+)?", node.name), node.output
    layers = {name.partition("/")[0] for name in names}
    assert {"conv", "prelu", "pool", "block1.conv1", "block1.prelu", "fc", "images", "embedding"} <= layers
    assert "16 numbers" in graph.doc_string


def test_shapes_of_what_is_multiplied_are_stated(path: Path) -> None:
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        for value in onnx.load(path).graph.value_info
    }
    assert shapes["conv:0"] == [8, 8, 7] and shapes["block2_conv2:0"] == [8, 4, 3]


def test_names_take_a_hundredth_of_a_small_networks_file_at_most(mobilefacenet_file: Path, tmp_path: Path) -> None:
    file = qface.export(qface.load(mobilefacenet_file), tmp_path / "net.onnx")
    model = onnx.load(file)
    for node in model.graph.node:
        node.name = ""
    del model.graph.value_info[:]
    model.graph.doc_string = ""
    assert file.stat().st_size <= 1.01 * model.ByteSize()


def test_an_image_embeds_alike_in_any_batch(path: Path, student: fx.GraphModule) -> None:
    images = PREPROCESSING(random_faces(16))
    embedder = OnnxEmbedder(path, threads=1)
    together = embedder(images)
    assert together.shape == (16, 16)
    assert len(together.unique(dim=0)) == 16
    assert torch.equal(torch.cat([embedder(image[None]) for image in images]), together)
    assert torch.equal(embedder(images[5:8]), together[5:8])


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_and_activations_keep_to_their_bits(bits: int, tmp_path: Path) -> None:
    qface.export(tiny(bits), tmp_path / "net.onnx", weight_format="int8")
    constants = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    read = read_by_multiplications(tmp_path / "net.onnx")
    for layers in read.values():
        for layer in layers:
            weight = constants[f"{layer}.weight"]
            assert weight.dtype == np.int8
            assert -(2 ** (bits - 1)) <= weight.min() < 0 < weight.max() <= 2 ** (bits - 1) - 1
            assert constants[f"{layer}.bias"].dtype == np.int32
            assert len(constants[f"{layer}.weight_scale"]) == len(weight)
    assert all(constant.size <= 16 for constant in constants.values() if constant.dtype == np.float32)
    assert sum(constant.size for constant in constants.values() if constant.dtype == np.int8) > 3000

    images = PREPROCESSING(random_faces(16, seed=3)).numpy()
    outputs = session(tmp_path / "net.onnx", list(read)).run(None, {"images": images})[1:]
    for layers, tensor in zip(read.values(), outputs, strict=True):
        assert tensor.dtype == np.uint8
        if layers == ["conv"]:
            assert len(np.unique(tensor)) > 200  # the bytes of the image
        else:
            assert tensor.min() >= 256 - 2**bits
            assert 2 <= len(np.unique(tensor)) <= 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_weights_take_their_bits_and_compute_the_same(bits: int, tmp_path: Path) -> None:
    student = tiny(bits)
    packed = qface.export(student, tmp_path / "packed.onnx")
    plain = qface.export(student, tmp_path / "plain.onnx", weight_format="int8")
    weights = sum(module.weight.numel() for module in student.modules() if isinstance(module, WeightedLayer))
    planes = [
        tensor for tensor in onnx.load(packed).graph.initializer if re.fullmatch(rf"w{bits}_plane\d", tensor.name)
    ]
    in_bytes = sum(numpy_helper.to_array(plane).nbytes for plane in planes)
    assert weights * bits / 8 <= in_bytes < weights * bits / 8 + len(planes)

    images = PREPROCESSING(random_faces(4))
    assert torch.equal(OnnxEmbedder(packed, threads=1)(images), OnnxEmbedder(plain, threads=1)(images))
    kernels = {kind: optimized_operators(path, tmp_path) for kind, path in (("packed", packed), ("plain", plain))}
    assert kernels["packed"] == kernels["plain"]


def test_bit_widths_of_one_file_are_packed_apart(tmp_path: Path) -> None:
    config = QuantizationConfig(overrides={"block1.conv2": LayerBits(weight=3)})
    student = tiny(config)
    path = qface.export(student, tmp_path / "net.onnx")
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert {"w3_plane0", "w3_plane2", "w6_plane0", "w6_plane4"} <= names
    assert_exact(student, path)


def test_an_unknown_weight_format_is_refused(tmp_path: Path) -> None:
    for model in (tiny(6), network()):
        with pytest.raises(ConfigError, match="weight_format must be one of 'packed', 'int8'"):
            qface.export(model, tmp_path / "net.onnx", weight_format="zip")
    assert not list(tmp_path.iterdir())


def test_bits_of_single_layers_are_in_the_file(tmp_path: Path) -> None:
    config = QuantizationConfig(overrides={"block1.conv2": LayerBits(weight=3, activation=4)})
    qface.export(tiny(config), tmp_path / "net.onnx", weight_format="int8")
    constants = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    assert np.abs(constants["block1.conv2.weight"].astype(int)).max() <= 4
    assert np.abs(constants["block2.conv2.weight"].astype(int)).max() > 4
    read = read_by_multiplications(tmp_path / "net.onnx")
    images = PREPROCESSING(random_faces(8)).numpy()
    outputs = session(tmp_path / "net.onnx", list(read)).run(None, {"images": images})[1:]
    least = {layers[0]: tensor.min() for layers, tensor in zip(read.values(), outputs, strict=True)}
    assert least["block1.conv2"] == 240
    assert 192 <= least["block2.conv2"] < 240


def test_exporting_changes_nothing_in_the_student(tmp_path: Path) -> None:
    student = tiny().train()
    student.get_submodule("block1").eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    qface.export(student, tmp_path / "net.onnx")
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_layers_may_be_called_anything(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images = nn.Conv2d(3, CHANNELS, 3, 2)
            self.images_float = nn.PReLU(CHANNELS)
            self.level_0 = nn.Conv2d(CHANNELS, CHANNELS, 1)
            self.output = nn.MaxPool2d(11)
            self.embedding = nn.Linear(CHANNELS, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(torch.flatten(self.output(self.level_0(self.images_float(self.images(x)))), 1))

    model = with_preprocessing(seeded(Named), Preprocessing(size=(SIDE, SIDE)))
    assert_exact(calibrated(model), tmp_path / "net.onnx")


def test_channels_may_be_normalized_differently(tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=(32, 32), mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    model = with_preprocessing(tiny_face_net(size=(32, 32)), preprocessing)
    assert_exact(calibrated(model), tmp_path / "net.onnx")
    assert OnnxEmbedder(tmp_path / "net.onnx").preprocessing == preprocessing


def test_foreign_network_goes_all_the_way_without_its_source(crops: Crops, tmp_path: Path) -> None:
    size = (48, 48)
    student = calibrate(
        quantize(with_preprocessing(foreign_net(size=size), Preprocessing(size=size)), 6), random_faces()
    )
    qface.save(student, tmp_path / "student.safetensors")
    folder = crops({"Anna": 3, "Berta": 2})
    code = """
import json, sys, qface
student = qface.load("student.safetensors")
qface.export(student, "net.onnx")
result = qface.evaluate("net.onnx", "crops")
assert not any(name.split(".")[0] == "tests" for name in sys.modules)
print(json.dumps(result.to_dict()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["images"], result["genuine_pairs"], result["impostor_pairs"]) == (5, 4, 6)
    assert result["runtime"].startswith("onnxruntime")

    images = preprocessing_of(student)(random_faces(8, seed=5))
    with torch.no_grad():
        expected = student.eval()(images)
    assert F.cosine_similarity(OnnxEmbedder(tmp_path / "net.onnx")(images), expected).mean() > 0.999
    assert qface.evaluate(tmp_path / "net.onnx", folder).images == 5


# ---- embeddings of unit length


@pytest.mark.parametrize("options", [{}, {"input": "uint8"}, {"target": "float32"}, {"target": "cuda"}], ids=str)
def test_a_students_embeddings_get_unit_length(
    options: dict[str, str], student: fx.GraphModule, tmp_path: Path
) -> None:
    plain = qface.export(student, tmp_path / "plain.onnx", **options)
    path = qface.export(student, tmp_path / "unit.onnx", normalize=True, **options)
    assert_unit_length(path, plain)
    agreement = qface.verify(student, path, random_faces(8))
    assert agreement.agrees and agreement.layers == qface.verify(student, plain, random_faces(8)).layers


@pytest.mark.parametrize("input", ["float32", "uint8"])
def test_a_float_networks_embeddings_get_unit_length(input: str, tmp_path: Path) -> None:
    plain = qface.export(network(), tmp_path / "plain.onnx", input=input)
    assert_unit_length(qface.export(network(), tmp_path / "unit.onnx", input=input, normalize=True), plain)


def assert_unit_length(path: Path, plain: Path) -> None:
    images = PREPROCESSING(random_faces(6, seed=2))
    rows = OnnxEmbedder(path, threads=1)(images)
    assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-6)
    assert torch.allclose(rows, F.normalize(OnnxEmbedder(plain, threads=1)(images)), atol=1e-6)
    assert props(path)["embedding"] == "unit length" and "embedding" not in props(plain)
    assert signature(path) == signature(plain)
    assert Preprocessing.from_json(props(path)["preprocessing"]) == PREPROCESSING
    assert qface.selftest(path).agrees


@pytest.mark.parametrize("make", [tiny, network])
def test_a_file_with_unit_length_loads(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    options = {"target": "float32"} if make is tiny else {}
    path = qface.export(make(), tmp_path / "unit.onnx", normalize=True, **options)
    images = PREPROCESSING(random_faces(6, seed=2))
    with torch.no_grad():
        rows = qface.load(path).eval()(images)
    assert torch.allclose(rows, OnnxEmbedder(path, threads=1)(images), atol=1e-5)


# ---- the file of a float network


@pytest.mark.parametrize("build", [tiny_face_net, foreign_net])
def test_float_network_is_exported_as_it_is(build: Callable[..., nn.Module], crops: Crops, tmp_path: Path) -> None:
    model = with_preprocessing(build(size=PREPROCESSING.size), PREPROCESSING).train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    path = qface.export(model, tmp_path / "net.onnx")
    assert [module.training for module in model.modules()] == modes

    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert onnx.load(path).ir_version <= 10
    assert signature(path) == [("images", ["batch", 3, 32, 28]), ("embedding", ["batch", 16])]
    assert Preprocessing.from_json(props(path)["preprocessing"]) == PREPROCESSING
    assert {tensor.data_type for tensor in onnx.load(path).graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    for count in (1, 5):
        images = PREPROCESSING(random_faces(count))
        with torch.no_grad():
            expected = model.eval()(images)
        assert torch.allclose(OnnxEmbedder(path, threads=1)(images), expected, atol=1e-4)
    folder = crops({"Anna": 2, "Berta": 2})
    measured, same = qface.evaluate(path, folder), qface.evaluate(model, folder)
    assert measured.runtime.startswith("onnxruntime")
    assert measured.thresholds == pytest.approx(same.thresholds, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_networks_in_other_types_are_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network().to(dtype)
    path = qface.export(model, tmp_path / "net.onnx")
    images = PREPROCESSING(random_faces(4))
    with torch.no_grad():
        expected = copy.deepcopy(model).float().eval()(images)
    assert torch.allclose(OnnxEmbedder(path, threads=1)(images), expected, atol=1e-4)
    assert next(model.parameters()).dtype is dtype


class ByChance(nn.Module):
    """An embedder that drops half of its embedding in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 28, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x.flatten(1)), training=True)


@pytest.mark.parametrize("input", ["float32", "uint8"])
def test_float_networks_are_compared_with_their_file(input: str, tmp_path: Path) -> None:
    path = qface.export(network(), tmp_path / "net.onnx", input=input, images=random_faces(3))
    assert props(path)["verified"] == "3 given images"
    with pytest.raises(ExportError, match="onnxruntime and the network differ"):
        qface.export(with_preprocessing(ByChance(), PREPROCESSING), tmp_path / "chance.onnx", input=input)
    assert list(tmp_path.iterdir()) == [path]


# ---- no file


def refused(model: nn.Module, error: type[QFaceError], path: Path) -> str:
    """The message of one line with which exporting fails, leaving the folder as it was."""
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(error) as caught:
        qface.export(model, path)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Applied(torch.tanh),
    "layer": lambda: nn.Tanh(),
    "scalar": lambda: Applied(lambda x: x * 2),
    "pooling to 2x2": lambda: nn.AdaptiveAvgPool2d(2),
    "average with a divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "reflecting padding": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "padding by name": lambda: nn.Conv2d(8, 8, 3, padding="same"),
    "linear over pixels": lambda: nn.Linear(12, 4),
    "flattening a part": lambda: nn.Flatten(2),
    "an average of padding with ceil_mode": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "a divided sum with ceil_mode": lambda: nn.AvgPool2d(4, 3, 2, ceil_mode=True, divisor_override=7),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_exported(case: str, tmp_path: Path) -> None:
    student = calibrated(framed(UNUSUAL[case]), 8)
    path = qface.export(student, tmp_path / "net.onnx")
    assert qface.verify(student, path, random_faces(3, seed=6)).agrees


@pytest.mark.parametrize("existing", [False, True])
def test_a_student_that_is_not_calibrated_is_refused(existing: bool, tmp_path: Path) -> None:
    if existing:
        (tmp_path / "net.onnx").write_bytes(b"an older file")
    assert "qface.calibrate" in refused(quantize(network()), ConfigError, tmp_path / "net.onnx")


@pytest.mark.parametrize("quantized", [False, True])
def test_paths_that_cannot_be_written_are_refused(quantized: bool, tmp_path: Path) -> None:
    model = tiny() if quantized else network()
    assert ".onnx" in refused(model, ExportError, tmp_path / "net.pt")
    with pytest.raises(ExportError, match="folder"):
        qface.export(model, tmp_path / "missing" / "net.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match="cannot write"):
        qface.export(model, tmp_path / "folder.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


class TwoInputs(Framed):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class TwoOutputs(Framed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.stem(x)


class Map(Framed):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


def small(kind: type[nn.Module]) -> nn.Module:
    return with_preprocessing(seeded(lambda: kind(nn.MaxPool2d(4))), Preprocessing(size=(SIDE, SIDE)))


@pytest.mark.parametrize("kind", [TwoInputs, TwoOutputs, Map])
def test_float_networks_that_are_no_embedders_are_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    assert "the network" in refused(small(kind), ExportError, tmp_path / "net.onnx")


def test_float_networks_that_torch_cannot_export_are_refused(tmp_path: Path) -> None:
    model = small(Framed)
    model.body = Applied(lambda x: torch.linalg.svdvals(x)[..., None])
    model.fc = nn.Linear(96, 4)
    assert "torch cannot export" in refused(model, ExportError, tmp_path / "net.onnx")


def test_students_that_are_no_embedders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"\[N, 8, 12, 12\]: no output"):
        quantize(small(Map))
    student = calibrated(small(Framed))
    with student.graph.inserting_after(next(iter(student.graph.nodes))):
        student.graph.placeholder("second")
    student.recompile()
    assert "2 inputs" in refused(student, ExportError, tmp_path / "net.onnx")


def test_a_value_that_is_read_rounded_and_unrounded_is_refused(tmp_path: Path) -> None:
    student = calibrated(framed(lambda: Sum(nn.ReLU())))
    stem = next(node for node in student.graph.nodes if node.target == "stem")
    (quantizer,) = stem.users
    relu = next(node for node in quantizer.users if node.target == "body.left")
    relu.replace_input_with(quantizer, stem)
    student.recompile()
    assert "'stem' has quantized and unquantized consumers" in refused(student, ExportError, tmp_path / "net.onnx")
