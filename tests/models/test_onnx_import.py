"""ONNX files of face networks, as torch's and MXNet's exporters write them, read back as torch networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import qface
from qface.errors import CheckpointError, UnsupportedLayerError
from qface.models import MobileFaceNet
from qface.provenance import provenance_of, record_step
from qface.models.iresnet import IResNet
from qface.preprocessing import preprocessing_of
from tests.networks import foreign_net, random_faces, with_statistics

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "iresnet": lambda: IResNet((1, 1, 1, 1), 16),
    "mobilefacenet": lambda: MobileFaceNet(16),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_statistics(NETWORKS[name]()).eval()


def exported(model: nn.Module, path: Path, opset: int, folded: bool) -> Path:
    """What torch's exporter of TorchScript writes, with which InsightFace's files were made."""
    training = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, 112, 112),),
            path,
            opset_version=opset,
            dynamo=False,
            training=training,
            do_constant_folding=folded,
            input_names=["input.1"],
            dynamic_axes={"input.1": {0: "n"}},
        )
    return path


def difference(one: Tensor, other: Tensor) -> float:
    """Greatest, in parts of the longest embedding."""
    return float((one - other).abs().max() / one.norm(dim=1).max())


@pytest.mark.parametrize("opset", [11, 13, 14, 17, 20])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "batch norms"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_torch_exports_them(name: str, folded: bool, opset: int, tmp_path: Path) -> None:
    model = made(name)
    imported = qface.load(exported(model, tmp_path / "w600k.onnx", opset, folded))
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5
    assert not imported.training
    norms = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in imported.modules())
    originally = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    assert norms < originally if folded else norms == originally
    if not folded:
        assert set(imported.state_dict()) == set(model.state_dict())


def test_what_is_imported_is_like_any_other_network(tmp_path: Path) -> None:
    imported = qface.load(exported(made("mobilefacenet"), tmp_path / "mbf.onnx", 17, folded=True))
    qface.save(imported, tmp_path / "mbf.safetensors")
    again = qface.load(tmp_path / "mbf.safetensors")
    faces = random_faces(4)
    x = preprocessing_of(imported)(faces)
    with torch.no_grad():
        assert torch.equal(imported(x), again(x))
    student = qface.calibrate(qface.quantize(imported), faces)
    file = qface.export(student, tmp_path / "student.onnx")
    assert qface.verify(student, file, faces).agrees


def test_our_own_float_files_come_back(tmp_path: Path) -> None:
    model = made("mobilefacenet")
    model.preprocessing = qface.Preprocessing()
    imported = qface.load(qface.export(model, tmp_path / "float.onnx"))
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5


def test_our_own_files_say_what_they_read_and_how_they_were_made(tmp_path: Path) -> None:
    model = record_step(made("mobilefacenet"), "prune", {"ratio": 0.2})
    model.preprocessing = qface.Preprocessing(color="BGR", std=(128.0,) * 3)
    path = qface.export(model, tmp_path / "float.onnx")
    imported = qface.load(path)
    assert imported.preprocessing == model.preprocessing
    assert provenance_of(imported) == provenance_of(model)
    written = onnx.load(path)
    helper.set_model_props(written, {"provenance": "[1]"})
    onnx.save(written, path)
    with pytest.raises(CheckpointError, match="no list of steps"):
        qface.load(path)


def test_a_network_unlike_any_of_ours(tmp_path: Path) -> None:
    model = foreign_net()
    imported = qface.load(exported(model, tmp_path / "foreign.onnx", 17, folded=False))
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5


# ---- graphs as MXNet's and others' exporters write them


class Graph:
    """Nodes and weights one after the other."""

    def __init__(self, opset: int = 11) -> None:
        self.opset, self.nodes, self.weights, self.last = opset, [], [], "data"
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, *shape: int, value: object = None) -> str:
        array = np.asarray(self.rng.normal(0, 0.3, shape), np.float32) if value is None else np.asarray(value)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *inputs], [output], name=f"/{output}/x.1", **attributes))
        self.last = output
        return output

    def save(self, path: Path, shape: tuple[int | str, ...] = ("None", 3, 112, 112)) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "face",
            [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
            [helper.make_empty_tensor_value_info(self.last)],
            self.weights,
        )
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.save(model, path)
        return path


def stem(graph: Graph) -> None:
    graph.add("Conv", graph.constant("conv.weight", 8, 3, 3, 3), strides=[4, 4], pads=[1, 1, 1, 1])
    graph.add("PRelu", graph.constant("slope", 8, 1, 1))


def agrees(path: Path, pixels_to_file: Callable[[Tensor], Tensor]) -> None:
    """The imported network with its own preprocessing makes of bytes what onnxruntime makes of them."""
    imported = qface.load(path)
    faces = random_faces(2)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = pixels_to_file(faces.float()).numpy()
    expected = [session.run(None, {"data": each[None]})[0] for each in given]
    with torch.no_grad():
        found = imported(preprocessing_of(imported)(faces))
    assert difference(torch.from_numpy(np.concatenate(expected)), found) < 1e-5


def test_normalization_in_the_graph_becomes_preprocessing(tmp_path: Path) -> None:
    graph = Graph()
    graph.add("Sub", graph.constant("minus", value=np.float32(127.5)))
    graph.add("Mul", graph.constant("times", value=np.float32(0.0078125)))
    stem(graph)
    graph.add("Flatten")
    graph.add("Gemm", graph.constant("fc.weight", 6, 8 * 28 * 28), graph.constant("fc.bias", 6), transB=1)
    path = graph.save(tmp_path / "mxnet.onnx")
    preprocessing = preprocessing_of(qface.load(path))
    assert (preprocessing.mean, preprocessing.std) == ((127.5,) * 3, (128.0,) * 3)
    agrees(path, lambda pixels: pixels)


@pytest.mark.parametrize(
    ("opset", "size"), [(11, ("None", 3, 112, 112)), (13, (1, 3, 112, 96)), (18, ("n", "c", "h", "w"))]
)
def test_sizes_computed_as_it_runs_and_a_bias_added(opset: int, size: tuple, tmp_path: Path) -> None:
    graph = Graph(opset)
    stem(graph)
    tensor = graph.last
    axes = {"axes": [0]} if opset < 13 else {}
    more = () if opset < 13 else (graph.constant("zero", value=np.array([0])),)
    graph.add("Shape")
    graph.add("Gather", graph.constant("first", value=np.int64(0)), axis=0)
    graph.add("Unsqueeze", *more, **axes)
    count = graph.last
    graph.last = count
    graph.add("Concat", graph.constant("rest", value=np.array([-1])), axis=0)
    shape, graph.last = graph.last, tensor
    graph.add("Reshape", shape)
    width = 24 if size[3] == 96 else 28
    graph.add("MatMul", graph.constant("matrix", 8 * 28 * width, 6))
    graph.add("Add", graph.constant("shift", 6))
    statistics = [graph.constant(name, 6) for name in ("gamma", "beta", "mean")]
    variance = graph.constant("variance", value=np.ones(6, np.float32))
    graph.add("BatchNormalization", *statistics, variance, epsilon=2e-5)
    path = graph.save(tmp_path / "arcface.onnx", size)
    imported = qface.load(path)
    assert preprocessing_of(imported).size == ((112, 96) if size[3] == 96 else (112, 112))
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in imported.modules()) == 1
    agrees(path, lambda pixels: qface.Preprocessing(size=preprocessing_of(imported).size)(pixels.byte()))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_pools_gates_and_clips(opset: int, tmp_path: Path) -> None:
    graph = Graph(opset)
    stem(graph)
    graph.add("Clip", graph.constant("low", value=np.float32(0)), graph.constant("high", value=np.float32(6)))
    graph.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    tensor = graph.last
    if opset < 18:
        graph.add("ReduceMean", axes=[2, 3], keepdims=1)
    else:
        graph.add("ReduceMean", graph.constant("axes", value=np.array([2, 3])), keepdims=1)
    graph.add("Conv", graph.constant("gate.weight", 8, 8, 1, 1))
    graph.add("Sigmoid")
    gate, graph.last = graph.last, tensor
    graph.add("Mul", gate)
    pooled = graph.last
    graph.add("AveragePool", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    graph.add("Concat", pooled, axis=1)
    graph.add("LeakyRelu", alpha=0.2)
    graph.add("GlobalAveragePool")
    if opset < 13:
        graph.add("Squeeze", axes=[2, 3])
    else:
        graph.add("Squeeze", graph.constant("squeezed", value=np.array([2, 3])))
    agrees(graph.save(tmp_path / "gates.onnx"), lambda pixels: (pixels - 127.5) / 127.5)


REFUSED: dict[str, tuple[Callable[[Graph], object], str]] = {
    "an unknown operation": (lambda g: g.add("Softmax"), "is a Softmax, which cannot be imported"),
    "uneven padding": (
        lambda g: g.add("Conv", g.constant("w", 8, 8, 3, 3), pads=[0, 0, 1, 1]),
        "different padding on opposite sides",
    ),
    "automatic padding": (
        lambda g: g.add("Conv", g.constant("w", 8, 8, 3, 3), auto_pad="SAME_UPPER"),
        "auto_pad SAME_UPPER",
    ),
    "a shift of an image": (lambda g: g.add("Add", g.constant("b", 8, 1, 1)), "a constant b that is no bias"),
    "a constant factor": (lambda g: g.add("Mul", g.constant("b", 8, 1, 1)), "a constant factor"),
    "a quantized file": (
        lambda g: g.add("QuantizeLinear", g.constant("s", value=np.float32(1)), g.constant("z", value=np.uint8(0))),
        "is quantized already",
    ),
    "slopes for each pixel": (lambda g: g.add("PRelu", g.constant("a", 8, 28, 28)), "slopes of shape"),
    "a constant part": (
        lambda g: g.nodes.append(helper.make_node("Concat", [g.constant("k", 1, 4), g.last], ["joined"], axis=1)),
        "k is a constant or unknown",
    ),
    "weights that are computed": (lambda g: g.add("Conv", g.nodes[0].output[0]), "computes its"),
}


@pytest.mark.parametrize(("last", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_imported_is_named(last: Callable[[Graph], object], message: str, tmp_path: Path) -> None:
    graph = Graph(13)
    stem(graph)
    last(graph)
    with pytest.raises(UnsupportedLayerError, match=message):
        qface.load(graph.save(tmp_path / "net.onnx"))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        qface.load(tmp_path / "none.onnx")
    (tmp_path / "half.onnx").write_bytes(b"\x08\x08\x12\xff\xff\xff")
    with pytest.raises(CheckpointError, match="is no complete ONNX file"):
        qface.load(tmp_path / "half.onnx")
    graph = Graph()
    stem(graph)
    with pytest.raises(CheckpointError, match=r"and no images \[N, 3, height, width\]"):
        qface.load(graph.save(tmp_path / "rows.onnx", (1, 3)))
    path = graph.save(tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="brings its own network"):
        qface.load(path, model=made("mobilefacenet"))


@pytest.mark.parametrize(
    "last",
    [
        lambda g: g.add("MaxPool", kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
        lambda g: g.add("PRelu", g.constant("across", 28)),
    ],
)
def test_what_torch_cannot_run_is_refused(last: Callable[[Graph], object], tmp_path: Path) -> None:
    graph = Graph(13)
    stem(graph)
    last(graph)
    with pytest.raises(CheckpointError, match="was not understood: torch cannot run it"):
        qface.load(graph.save(tmp_path / "net.onnx"))


def test_an_image_divided_by_zero_is_no_preprocessing(tmp_path: Path) -> None:
    graph = Graph(13)
    graph.add("Div", graph.constant("none", value=np.float32(0)))
    stem(graph)
    with pytest.raises(UnsupportedLayerError, match="is a Div"):
        qface.load(graph.save(tmp_path / "net.onnx"))


def test_constants_as_nodes_and_a_clip_from_below(tmp_path: Path) -> None:
    graph = Graph(13)
    for name, value in (("minus", 127.5), ("by", 64.0)):
        made = numpy_helper.from_array(np.float32(value))
        graph.nodes.append(helper.make_node("Constant", [], [name], value=made))
    graph.add("Sub", "minus")
    graph.add("Div", "by")
    graph.add("Conv", graph.constant("conv.weight", 8, 3, 3, 3), strides=[4, 4], pads=[1, 1, 1, 1])
    graph.add("Clip", graph.constant("low", value=np.float32(0)))
    graph.add("Flatten")
    path = graph.save(tmp_path / "net.onnx")
    imported = qface.load(path)
    assert preprocessing_of(imported).std == (64.0,) * 3
    assert any(isinstance(layer, nn.ReLU) for layer in imported.modules())
    agrees(path, lambda pixels: pixels)


def test_a_graph_that_is_misunderstood_is_refused(tmp_path: Path) -> None:
    """Sizes computed as it runs are taken for rows; where they say something else, onnxruntime tells."""
    graph = Graph(13)
    stem(graph)
    tensor = graph.last
    graph.add("Shape")
    graph.add("Slice", graph.constant("from", value=np.array([1])), graph.constant("to", value=np.array([2])))
    graph.add("Concat", graph.constant("all", value=np.array([-1])), axis=0)
    shape, graph.last = graph.last, tensor
    graph.add("Reshape", shape)
    with pytest.raises(CheckpointError, match="was not understood"):
        qface.load(graph.save(tmp_path / "net.onnx"))


@pytest.mark.faces
def test_real_networks(faces: Path, tmp_path: Path) -> None:
    model = qface.load(faces / "weights" / "iresnet18.safetensors")
    imported = qface.load(exported(model, tmp_path / "w600k_r18.onnx", 14, folded=True))
    x = preprocessing_of(model)(random_faces(2))
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5
