"""What an ONNX file reads: found once, and the same for onnxruntime and for the imported network."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto
from torch import Tensor

import qface
from qface.cli import main
from qface.data.sources import as_image_source
from qface.deployment.runtime import OnnxEmbedder
from qface.evaluation.embedding import Embeddings, Model
from qface.evaluation.embedding import embed as embed_source
from qface.models.onnx_import import find_image_input, read_onnx
from qface.preprocessing import Preprocessing, preprocessing_of
from tests.models.onnx_graphs import Graph, network
from tests.networks import random_faces

FACES = random_faces(3)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def embed(model: Model, faces: Tensor) -> Embeddings:
    return embed_source(model, as_image_source(faces))


def channels(graph: Graph, values: tuple[float, ...]) -> str:
    return graph.constant(value=np.array(values, np.float32).reshape(3, 1, 1))


def mxnet(graph: Graph) -> None:
    graph.add("Identity")
    graph.add("Sub", graph.constant(value=np.float32(127.5)))
    graph.add("Mul", graph.constant(value=np.float32(0.0078125)))


def centered_unit(graph: Graph) -> None:
    graph.add("Sub", graph.constant(value=0.5))
    graph.add("Div", graph.constant(value=0.5))


def sum_and_product(graph: Graph) -> None:
    graph.add("Mul", graph.constant(value=np.float32(1 / 128)))
    graph.add("Add", graph.constant(value=np.float32(-127.5 / 128)))


def imagenet(graph: Graph) -> None:
    graph.add("Sub", channels(graph, IMAGENET_MEAN))
    graph.add("Div", channels(graph, IMAGENET_STD))


def imagenet_of_bytes(graph: Graph) -> None:
    graph.add("Div", graph.constant(value=255.0))
    imagenet(graph)


def mean_of_each_channel(graph: Graph) -> None:
    graph.add("Sub", channels(graph, (123.68, 116.78, 103.94)))


def batch_norm(graph: Graph) -> None:
    statistics = ((1.0, 1.0, 1.0), (0.1, 0.0, -0.1), (131.0, 110.0, 100.0), (4000.0, 4100.0, 3900.0))
    graph.add("BatchNormalization", *(graph.constant(value=np.array(each, np.float32)) for each in statistics))


def gather_of_colors(graph: Graph) -> None:
    graph.add("Gather", graph.constant(value=np.array([2, 1, 0])), axis=1)
    mxnet(graph)


def slice_of_colors(graph: Graph) -> None:
    mxnet(graph)
    numbers = [graph.constant(value=np.array([each])) for each in (-1, -(2**31), 1, -1)]
    graph.add("Slice", *numbers)


def parts_of_colors(graph: Graph) -> None:
    graph.add("Split", axis=1, outputs=3)
    red = graph.last
    parts = [red.replace("_0", f"_{number}") for number in (2, 1, 0)]
    graph.add("Concat", *parts[1:], after=parts[0], axis=1)
    centered_unit(graph)


def each_channel_by_itself(graph: Graph) -> None:
    made = []
    for channel in range(3):
        bounds = [graph.constant(value=np.array([each])) for each in (channel, channel + 1, 1)]
        graph.add("Slice", *bounds, after="data")
        graph.add("Sub", graph.constant(value=np.float32(IMAGENET_MEAN[channel])))
        made.append(graph.add("Div", graph.constant(value=np.float32(IMAGENET_STD[channel]))))
    graph.add("Concat", *made[1:], after=made[0], axis=1)


def computed_constants(graph: Graph) -> None:
    graph.add("Div", graph.constant(value=np.float32(255)), after=graph.constant(value=np.float32(127.5)))
    half = graph.last
    graph.add("Sub", half, after="data")
    graph.add("Mul", graph.constant(value=2.0))


def nothing(graph: Graph) -> None:
    graph.add("Identity")


def learned_norm_of_normalized_images(graph: Graph) -> None:
    statistics = ((1.0, 1.1, 0.9), (0.1, 0.0, -0.1), (-0.1, -0.2, -0.1), (0.3, 0.35, 0.3))
    graph.add("BatchNormalization", *(graph.constant(value=np.array(each, np.float32)) for each in statistics))


def pixels(faces: Tensor) -> Tensor:
    return faces.float()


def unit(faces: Tensor) -> Tensor:
    return faces.float() / 255


def default(faces: Tensor) -> Tensor:
    return (faces.float() - 127.5) / 127.5


WAYS: dict[Callable[[Graph], None], tuple[Callable[[Tensor], Tensor], str]] = {
    mxnet: (pixels, "graph"),
    sum_and_product: (pixels, "graph"),
    centered_unit: (unit, "graph"),
    imagenet: (unit, "graph"),
    imagenet_of_bytes: (pixels, "graph"),
    mean_of_each_channel: (pixels, "graph"),
    batch_norm: (pixels, "graph"),
    gather_of_colors: (pixels, "graph"),
    slice_of_colors: (pixels, "graph"),
    parts_of_colors: (unit, "graph"),
    each_channel_by_itself: (unit, "graph"),
    computed_constants: (unit, "graph"),
    nothing: (default, "default"),
    learned_norm_of_normalized_images: (default, "default"),
}


def check(path: Path, fed: Tensor, faces: Tensor = FACES) -> qface.Preprocessing:
    """Both paths embed ``faces`` as onnxruntime embeds ``fed``, and agree on what the network reads."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"data": fed.numpy()})[0]).float()
    expected = torch.nn.functional.normalize(expected).numpy()
    imported, embedder = qface.load(path), OnnxEmbedder(path, threads=1)
    np.testing.assert_allclose(embed(embedder, faces), expected, atol=1e-4)
    np.testing.assert_allclose(embed(imported, faces), expected, atol=1e-4)
    assert embedder.preprocessing == preprocessing_of(imported)
    return embedder.preprocessing


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_both_paths_feed_what_the_graph_takes(way: Callable[[Graph], None], tmp_path: Path) -> None:
    graph = Graph()
    way(graph)
    network(graph)
    to_graph, source = WAYS[way]
    assert check(graph.save(tmp_path / "net.onnx"), to_graph(FACES)).source == source


def test_numbers_come_out_as_they_are_written(tmp_path: Path) -> None:
    for way, mean, std in (
        (mxnet, (127.5,) * 3, (128.0,) * 3),
        (centered_unit, (127.5,) * 3, (127.5,) * 3),
        (mean_of_each_channel, (123.68, 116.78, 103.94), (1.0,) * 3),
    ):
        graph = Graph()
        way(graph)
        network(graph)
        found = OnnxEmbedder(graph.save(tmp_path / "net.onnx")).preprocessing
        assert (found.mean, found.std) == (mean, std)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.UINT8])
def test_channels_last(dtype: int, tmp_path: Path) -> None:
    graph = Graph(shape=("n", 112, 112, 3), dtype=dtype)
    if dtype == TensorProto.UINT8:
        graph.add("Cast", to=TensorProto.FLOAT)
    graph.add("Mul", graph.constant(value=np.float32(1 / 255)))
    graph.add("Sub", graph.constant(value=np.array(IMAGENET_MEAN, np.float32)))
    graph.add("Div", graph.constant(value=np.array(IMAGENET_STD, np.float32)))
    graph.add("Transpose", perm=[0, 3, 1, 2])
    network(graph)
    fed = FACES.permute(0, 2, 3, 1).contiguous()
    check(graph.save(tmp_path / "net.onnx"), fed if dtype == TensorProto.UINT8 else fed.float())


def test_a_graph_that_normalizes_after_a_learned_layer_is_left_alone(tmp_path: Path) -> None:
    """A BatchNorm after the normalization is the network's own, so that integers can still read bytes."""
    graph = Graph()
    mxnet(graph)
    learned_norm_of_normalized_images(graph)
    network(graph)
    found = check(graph.save(tmp_path / "net.onnx"), pixels(FACES))
    assert found.std == (128.0,) * 3


def test_limits_of_pixels_are_no_normalization(tmp_path: Path) -> None:
    graph = Graph()
    graph.add("Clip", graph.constant(value=0.0), graph.constant(value=np.float32(100)))
    mxnet(graph)
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    reads = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"data": FACES.float().numpy()})[0]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(qface.load(path, preprocessing=reads), FACES), expected, atol=1e-4)


@pytest.mark.parametrize("width", [96, 112, 100])
def test_a_width_of_96_is_cut_and_others_are_resized(width: int, tmp_path: Path) -> None:
    graph = Graph(shape=("n", 3, 112, width))
    mxnet(graph)
    network(graph, (112, width))
    path = graph.save(tmp_path / "net.onnx")
    crop = (0, 8, 112, 104) if width == 96 else (0, 0, 112, 112)
    fed = Preprocessing(crop, (112, width), mean=(0.0,) * 3, std=(1.0,) * 3)(FACES)
    assert check(path, fed).crop == crop


def test_a_default_is_named_once_and_what_is_said_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph()
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    for read in (OnnxEmbedder, qface.load):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qface"):
            read(path)
        (record,) = caplog.records
        assert (
            "has no preprocessing in its metadata; the default is used: RGB 112x112, mean 127.5, std 127.5"
            in record.getMessage()
        )
        assert "--color" in record.getMessage()
    caplog.clear()
    said = graph.save(tmp_path / "said.onnx", {"preprocessing": Preprocessing(color="BGR").to_json()})
    for reader in (OnnxEmbedder, qface.load):
        reader(said)
        reader(path, preprocessing={"color": "BGR"})
    assert not caplog.records
    assert OnnxEmbedder(said).preprocessing == Preprocessing(color="BGR") == preprocessing_of(qface.load(said))


@pytest.mark.parametrize(
    "given", [{"color": "BGR"}, {"mean": (0.0,) * 3, "std": (255.0,) * 3}, {"crop": (8, 8, 104, 104)}]
)
@pytest.mark.parametrize("way", [nothing, mxnet, gather_of_colors, batch_norm], ids=lambda way: way.__name__)
def test_what_the_user_says_goes_into_the_graph(way: Callable[[Graph], None], given: dict, tmp_path: Path) -> None:
    graph = Graph()
    way(graph)
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    raw = {} if way is nothing else {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    fed = Preprocessing(**{**raw, **given})(FACES)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"data": fed.numpy()})[0]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed(OnnxEmbedder(path, preprocessing=given), FACES), expected, atol=1e-4)
    np.testing.assert_allclose(embed(qface.load(path, preprocessing=given), FACES), expected, atol=1e-4)


@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_our_own_float_files_that_read_bytes_load_again(color: str, tmp_path: Path) -> None:
    graph = Graph()
    mxnet(graph)
    network(graph)
    reads = Preprocessing(color=color, mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 1.0))
    model = qface.load(graph.save(tmp_path / "net.onnx"), preprocessing=reads)
    path = qface.export(model, tmp_path / "bytes.onnx", input="uint8")
    again, embedder = qface.load(path), OnnxEmbedder(path, threads=1)
    assert preprocessing_of(again) == embedder.preprocessing == preprocessing_of(model)
    assert embedder.input == "uint8"
    expected = embed(model, FACES)
    np.testing.assert_allclose(embed(again, FACES), expected, atol=1e-5)
    np.testing.assert_allclose(embed(embedder, FACES), expected, atol=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    graph = Graph(dtype=TensorProto.FLOAT16)
    graph.add("Sub", graph.constant(value=np.float16(127.5)))
    graph.add("Mul", graph.constant(value=np.float16(0.0078125)))
    graph.add("Cast", to=TensorProto.FLOAT)
    network(graph)
    path = graph.save(tmp_path / "half.onnx")
    found = check(path, FACES.half())
    assert (found.mean, found.std) == ((127.5,) * 3, (128.0,) * 3)


def test_a_prefix_that_grows_is_no_normalization(tmp_path: Path) -> None:
    graph = Graph()
    for _ in range(6):
        graph.add("Concat", graph.last, axis=3)
    graph.add("Slice", *(graph.constant(value=np.array([each])) for each in (0, 112, 3)))
    network(graph)
    assert find_image_input(read_onnx(graph.save(tmp_path / "net.onnx"))).preprocessing.source == "default"


# ---- on the command line


def shown(path: Path, *options: str) -> dict:
    """What ``bench`` says of a file, as JSON."""
    result = CliRunner().invoke(main, ["bench", str(path), "--runs", "1", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"][0]


def test_options_say_what_a_file_reads(tmp_path: Path) -> None:
    graph = Graph()
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    assert shown(path)["preprocessing"] == "RGB 112x112, mean 127.5, std 127.5 (default)"
    options = ("--color", "BGR", "--mean", "0", "--std", "255,254,253", "--crop", "8,8,104,104", "--size", "112x112")
    expected = "BGR 112x112 of the crop 8,8,104,104, mean 0, std 255,254,253 (given)"
    assert shown(path, *options)["preprocessing"] == expected


@pytest.mark.parametrize("options", [("--mean", "1,2"), ("--std", "0"), ("--crop", "1"), ("--size", "112x112x3")])
def test_options_out_of_range_are_one_line(options: tuple[str, str], tmp_path: Path) -> None:
    graph = Graph()
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    result = CliRunner().invoke(main, ["bench", str(path), *options])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    ["evaluate", "ijb", "thresholds", "sensitivity", "allocate-bits", "quantize", "prune", "distill", "compress"],
)
def test_every_command_that_takes_a_model_has_them(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert all(option in text for option in ("--color", "--mean", "--std", "--crop", "--size"))


@pytest.mark.parametrize("way", [nothing, mxnet, centered_unit], ids=lambda way: way.__name__)
def test_evaluate_says_what_was_read(way: Callable[[Graph], None], tmp_path: Path, crops: Callable[..., Path]) -> None:
    graph = Graph()
    way(graph)
    network(graph)
    path = graph.save(tmp_path / "net.onnx")
    folder = crops({"Ann": 3, "Bob": 3})
    by_onnxruntime, by_torch = (qface.evaluate(model, folder) for model in (path, qface.load(path)))
    assert by_onnxruntime.preprocessing == by_torch.preprocessing == OnnxEmbedder(path).preprocessing.describe()
    assert by_onnxruntime.tpr_at_fpr == by_torch.tpr_at_fpr
    thresholds = [by_onnxruntime.thresholds[fpr] for fpr in by_torch.thresholds if by_torch.thresholds[fpr] is not None]
    expected = [value for value in by_torch.thresholds.values() if value is not None]
    np.testing.assert_allclose(thresholds, expected, atol=1e-4)
    result = CliRunner().invoke(main, ["evaluate", str(path), "--images", str(folder), "--json", "--color", "BGR"])
    assert "(given)" in json.loads(result.stdout.splitlines()[-1])["preprocessing"]
