"""A file that reads bytes computes what the file does that reads the same images normalized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto
from torch import Tensor, fx, nn

import qface
from qface.cli import main
from qface.data.folders import ImageFolder
from qface.deployment import OnnxEmbedder
from qface.errors import ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.integers import session
from tests.deployment.networks import calibrated
from tests.networks import foreign_net, random_faces, tiny_face_net

Crops = Callable[..., Path]

CROP, SIZE = (0, 8, 112, 104), (112, 96)
MEANS, DEVIATIONS = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
BYTES_ARE_INTEGERS = {
    "RGB": Preprocessing(CROP, SIZE),
    "BGR": Preprocessing(CROP, SIZE, "BGR", std=(128.0, 128.0, 128.0)),
    "mean 0": Preprocessing(CROP, SIZE, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)),
}
NORMALIZED = {
    "channels apart": Preprocessing(CROP, SIZE, mean=MEANS, std=DEVIATIONS),
    "channels apart, BGR": Preprocessing(CROP, SIZE, "BGR", MEANS, DEVIATIONS),
    "mean below all bytes": Preprocessing(CROP, SIZE, mean=(-20.0, -20.0, -20.0)),
}
PREPROCESSINGS = BYTES_ARE_INTEGERS | NORMALIZED


def student_of(preprocessing: Preprocessing, bits: int = 6) -> fx.GraphModule:
    return calibrated(with_preprocessing(tiny_face_net(size=preprocessing.size), preprocessing), bits)


def pixels(preprocessing: Preprocessing, count: int = 5) -> Tensor:
    """RGB bytes of the part that the network reads."""
    top, left, bottom, right = preprocessing.crop
    return random_faces(count, seed=1)[:, :, top:bottom, left:right]


def pair_of_files(model: nn.Module, folder: Path) -> tuple[Path, Path]:
    """The file that reads floats, and the one that reads bytes."""
    return qface.export(model, folder / "floats.onnx"), qface.export(model, folder / "bytes.onnx", input="uint8")


@pytest.fixture(scope="module")
def student() -> fx.GraphModule:
    return student_of(PREPROCESSINGS["RGB"])


@pytest.fixture(scope="module")
def files(student: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair_of_files(student, tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("case", PREPROCESSINGS)
def test_embeddings_of_bytes_are_those_of_floats(case: str, tmp_path: Path) -> None:
    preprocessing = PREPROCESSINGS[case]
    floats, bytes_ = pair_of_files(student_of(preprocessing), tmp_path)
    images = pixels(preprocessing)
    expected = OnnxEmbedder(floats, threads=1)(preprocessing(random_faces(5, seed=1)))
    assert torch.equal(OnnxEmbedder(bytes_, threads=1)(images), expected)
    (direct,) = session(bytes_).run(None, {"images": images.numpy()})
    assert torch.equal(torch.from_numpy(direct), expected)


@pytest.mark.parametrize("case", PREPROCESSINGS)
def test_a_float_network_normalizes_inside(case: str, tmp_path: Path) -> None:
    preprocessing = PREPROCESSINGS[case]
    model = with_preprocessing(tiny_face_net(size=preprocessing.size), preprocessing)
    floats, bytes_ = pair_of_files(model, tmp_path)
    expected = OnnxEmbedder(floats, threads=1)(preprocessing(random_faces(5, seed=1)))
    assert torch.allclose(OnnxEmbedder(bytes_, threads=1)(pixels(preprocessing)), expected, atol=1e-5)


def test_files_say_what_they_read(files: tuple[Path, Path], student: fx.GraphModule) -> None:
    for path, kind, element in zip(files, ("float32", "uint8"), (TensorProto.FLOAT, TensorProto.UINT8), strict=True):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        (images,) = model.graph.input
        assert images.type.tensor_type.elem_type == element
        assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["batch", 3, *SIZE]
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert metadata["input"] == OnnxEmbedder(path).input == kind
        assert Preprocessing.from_json(metadata["preprocessing"]) == PREPROCESSINGS["RGB"]


@pytest.mark.parametrize("case", BYTES_ARE_INTEGERS)
def test_the_first_convolution_reads_the_bytes(case: str, tmp_path: Path) -> None:
    path = qface.export(student_of(BYTES_ARE_INTEGERS[case]), tmp_path / "net.onnx", input="uint8")
    session(path, optimized=tmp_path / "optimized.onnx")
    readers = readers_of_images(onnx.load(tmp_path / "optimized.onnx").graph)
    reordered = ["Gather"] if BYTES_ARE_INTEGERS[case].color == "BGR" else []
    # onnxruntime's convolution of integers wants channels last, and four of them.
    assert [kind for kind in readers if kind != "Transpose"] == [*reordered, "Pad", "QLinearConv"]


def readers_of_images(graph: onnx.GraphProto) -> list[str]:
    """Operators that the images run through, one behind the other, up to the first convolution."""
    name, kinds = "images", [""]
    while "Conv" not in kinds[-1]:
        (node,) = (node for node in graph.node if name in node.input)
        name, kinds = node.output[0], [*kinds, node.op_type]
    return kinds[1:]


@pytest.mark.parametrize("case", PREPROCESSINGS)
@pytest.mark.parametrize("build", [tiny_face_net, foreign_net])
def test_such_a_file_agrees_with_its_student(build: Callable[..., nn.Module], case: str, tmp_path: Path) -> None:
    preprocessing = PREPROCESSINGS[case]
    student = calibrated(with_preprocessing(build(size=preprocessing.size), preprocessing), 6)
    path = qface.export(student, tmp_path / "net.onnx", input="uint8")
    agreement = qface.verify(student, path, random_faces(12, seed=2))
    assert agreement.agrees and agreement.images == 12
    assert agreement.layers[0].operation in ("Uint8Input", "QuantizeImage")
    assert agreement.layers[0].different == 0


def test_images_that_are_resized_are_rounded_for_both(tmp_path: Path) -> None:
    student = student_of(Preprocessing(size=(32, 28), color="BGR"))
    path = qface.export(student, tmp_path / "net.onnx", input="uint8")
    agreement = qface.verify(student, path, random_faces(12, seed=2))
    assert agreement.agrees
    assert all(layer.different == 0 for layer in agreement.layers)


def test_a_faulty_file_is_found(student: fx.GraphModule, files: tuple[Path, Path], tmp_path: Path) -> None:
    other = student_of(Preprocessing(CROP, SIZE, "BGR"))
    agreement = qface.verify(other, files[1], random_faces(8))
    assert not agreement.agrees
    assert agreement.layers[0].different


def test_figures_are_those_of_the_file_that_reads_floats(files: tuple[Path, Path], crops: Crops) -> None:
    folder = crops({"Ann": 3, "Bea": 3, "Cem": 2})
    floats, bytes_ = (qface.evaluate(path, folder, flip=True) for path in files)
    assert bytes_.thresholds == floats.thresholds
    assert bytes_.tpr_at_fpr == floats.tpr_at_fpr


def test_every_byte_of_such_a_file_is_counted(files: tuple[Path, Path]) -> None:
    floats, bytes_ = (qface.measure_size(path) for path in files)
    assert bytes_.bytes == files[1].stat().st_size
    assert bytes_.of_kind("weight").entries == floats.of_kind("weight").entries


@pytest.mark.parametrize("quantized", [False, True])
def test_an_unknown_input_is_refused(quantized: bool, student: fx.GraphModule, tmp_path: Path) -> None:
    model = student if quantized else with_preprocessing(tiny_face_net(size=SIZE), PREPROCESSINGS["RGB"])
    with pytest.raises(ConfigError, match="input must be one of 'float32', 'uint8'"):
        qface.export(model, tmp_path / "net.onnx", input="int4")
    assert not list(tmp_path.iterdir())


def test_the_command_line_exports_verifies_and_times_it(student: fx.GraphModule, crops: Crops, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    saved, file = tmp_path / "student.safetensors", tmp_path / "net.onnx"
    qface.save(student, saved)
    run("export", saved, "-o", file, "--input", "uint8")
    assert json.loads(run("verify", saved, file, "--images", crops({"Ann": 3}), "--json"))["agrees"]
    (row,) = json.loads(run("bench", file, "--runs", "1", "--json"))["rows"]
    assert row["median_ms"] > 0
    run("size", file)


@pytest.mark.faces
def test_real_network_reads_bytes(faces: Path, mobilefacenet_file: Path, tmp_path: Path) -> None:
    student = qface.load(mobilefacenet_file)
    floats, bytes_ = pair_of_files(student, tmp_path)
    crops = ImageFolder(faces / "data" / "lfw", identities="second-half").read(range(16))
    images = OnnxEmbedder(floats).preprocessing(crops)
    assert torch.equal(OnnxEmbedder(bytes_, threads=1)(images), OnnxEmbedder(floats, threads=1)(images))
