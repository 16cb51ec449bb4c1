"""ONNX files of face networks, as torch's and MXNet's exporters write them, read back as torch networks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import qface
from qface.data.sources import as_image_source
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import CheckpointError, LimitError, QFaceError, UnsupportedLayerError
from qface.evaluation import embed
from qface.models import MobileFaceNet
from qface.models.iresnet import IResNet
from qface.preprocessing import Preprocessing, preprocessing_of
from qface.provenance import provenance_of, record_step
from tests.models.onnx_graphs import Graph, network
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


@pytest.mark.parametrize("opset", [9, 13, 20])
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


def test_a_network_unlike_any_of_ours(tmp_path: Path) -> None:
    model = foreign_net()
    imported = qface.load(exported(model, tmp_path / "foreign.onnx", 17, folded=False))
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5


# ---- graphs as MXNet's and others' exporters write them

SIDE = 32


def small(opset: int = 13, batch: int | str = "n") -> Graph:
    """A graph that has made maps [N, 8, 8, 8]."""
    graph = Graph(opset, (batch, 3, SIDE, SIDE))
    graph.add("Conv", graph.constant(8, 3, 3, 3), graph.constant(8), strides=[4, 4], pads=[1, 1, 1, 1])
    return graph


def rows(graph: Graph) -> None:
    """[N, 6] of whatever there is."""
    graph.add("Flatten")


def agrees(path: Path, tolerance: float = 1e-5) -> nn.Module:
    """The imported network makes of normalized images what onnxruntime makes of them, of any number of them."""
    imported = qface.load(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = session.get_inputs()[0].shape[0]
    images = preprocessing_of(imported)(random_faces(3))
    given = [images] if isinstance(count, str) else images.split(count)
    expected = torch.cat([torch.from_numpy(session.run(None, {"data": each.numpy()})[0]) for each in given])
    with torch.no_grad():
        assert difference(expected, imported(images)) < tolerance
    return imported


def ints(graph: Graph, *values: int) -> str:
    return graph.constant(value=np.array(values, np.int64))


def safe_softmax(graph: Graph) -> None:
    """As torch's newer exporter writes attention, whose masked rows are not numbers."""
    weights = graph.add("Softmax", axis=-1)
    graph.add("IsNaN")
    graph.add("Where", graph.constant(value=0.0), weights)


def both_and_either(graph: Graph) -> None:
    x = graph.last
    positive = graph.add("Greater", graph.constant(value=0.0))
    small = graph.add("Less", graph.constant(value=0.5), after=x)
    both = graph.add("And", positive)
    either = graph.add("Or", small, after=positive)
    graph.add("And", both, after=either)
    graph.add("Where", x, graph.constant(value=0.25))


def attention(graph: Graph) -> None:
    graph.add("Reshape", ints(graph, 0, 8, 64))
    tokens = graph.add("Transpose", perm=[0, 2, 1])
    query = graph.add("MatMul", graph.constant(8, 8), after=tokens)
    graph.add("MatMul", graph.constant(8, 8), after=tokens)
    key = graph.add("Transpose", perm=[0, 2, 1])
    value = graph.add("MatMul", graph.constant(8, 8), after=tokens)
    graph.add("MatMul", key, after=query)
    graph.add("Div", graph.constant(value=2.8284))
    graph.add("Add", graph.constant(1, 64, 64))
    graph.add("Softmax", axis=-1)
    graph.add("MatMul", value)
    graph.add("Add", tokens)
    graph.add("ReduceMean", axes=[1], keepdims=0)


def class_token(graph: Graph) -> None:
    """A token for each image, repeated as torch's exporter writes ``expand``."""
    graph.add("Reshape", ints(graph, 0, 8, 64))
    tokens = graph.add("Transpose", perm=[0, 2, 1])
    graph.add("Shape")
    graph.add("Gather", graph.constant(value=np.int64(0)), axis=0)
    graph.add("Unsqueeze", ints(graph, 0))
    sizes = graph.add("Concat", ints(graph, 1, 8), axis=0)
    token = graph.add("Expand", sizes, after=graph.constant(1, 1, 8))
    graph.add("Concat", tokens, after=token, axis=1)
    graph.add("Add", graph.constant(1, 65, 8))
    graph.add("Gather", graph.constant(value=np.int64(0)), axis=1)


def gelu_written_out(graph: Graph) -> None:
    x = graph.last
    graph.add("Div", graph.constant(value=1.4142135))
    graph.add("Erf")
    graph.add("Add", graph.constant(value=1.0))
    graph.add("Mul", x)
    graph.add("Mul", graph.constant(value=0.5))


def channel_shuffle(graph: Graph) -> None:
    graph.add("Reshape", ints(graph, 0, 2, 4, 8, 8))
    graph.add("Transpose", perm=[0, 2, 1, 3, 4])
    graph.add("Reshape", ints(graph, 0, -1, 8, 8))


def split_and_maximum(graph: Graph) -> None:
    graph.add("Split", ints(graph, 4, 4), outputs=2, axis=1)
    graph.add("Max", graph.last.replace("_0", "_1"))


def weights_last(graph: Graph) -> None:
    """Keras writes a bias, a factor and an activation between two transpositions."""
    graph.add("Conv", graph.constant(8, 8, 3, 3), strides=[2, 2], pads=[0, 0, 1, 1])
    graph.add("Transpose", perm=[0, 2, 3, 1])
    graph.add("Add", graph.constant(8))
    graph.add("Mul", graph.constant(1, 1, 1, 8))
    graph.add("Relu")
    graph.add("Transpose", perm=[0, 3, 1, 2])


def normalize_rows(graph: Graph) -> None:
    x = graph.add("Flatten")
    norm = graph.add("ReduceL2", axes=[1], keepdims=1)
    graph.add("Clip", graph.constant(value=1e-12))
    limited = graph.last
    sizes = graph.add("Shape", after=x)
    expanded = graph.add("Expand", sizes, after=limited)
    graph.add("Div", expanded, after=x)
    del norm


def resized(opset_mode: dict, *scales: float) -> Callable[[Graph], None]:
    def add(graph: Graph) -> None:
        graph.add("Resize", "", graph.constant(value=np.array([1, 1, *scales], np.float32)), **opset_mode)

    return add


def one(op: str, **attributes: object) -> Callable[[Graph], None]:
    return lambda graph: graph.add(op, **attributes) and None


def with_constant(op: str, *shape: int, value: object = None, **attributes: object) -> Callable[[Graph], None]:
    return lambda graph: graph.add(op, graph.constant(*shape, value=value), **attributes) and None


def norms(op: str, count: int, channels: int = 8, **attributes: object) -> Callable[[Graph], None]:
    return lambda graph: graph.add(op, *(graph.constant(channels) for _ in range(count)), **attributes) and None


CASES: dict[str, tuple[int, Callable[[Graph], object]]] = {
    **{op: (20, one(op)) for op in ("Tanh", "Elu", "Selu", "Celu", "Softplus", "Mish", "Gelu", "Erf", "Abs", "Exp")},
    **{op: (20, one(op)) for op in ("Neg", "Sin", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu", "Floor", "Sign")},
    "Gelu tanh": (20, one("Gelu", approximate="tanh")),
    "HardSigmoid of torch": (13, one("HardSigmoid", alpha=1 / 6, beta=0.5)),
    "gelu written out": (13, gelu_written_out),
    "Softmax 11": (11, one("Softmax")),
    "Softmax": (13, one("Softmax", axis=1)),
    "LogSoftmax": (13, one("LogSoftmax", axis=-1)),
    "Sqrt of a square": (13, lambda g: (g.add("Pow", g.constant(value=2.0)), g.add("Sqrt"))),
    "Reciprocal": (13, lambda g: (g.add("Exp"), g.add("Reciprocal"))),
    "Log": (13, lambda g: (g.add("Softplus"), g.add("Log"))),
    "LayerNormalization": (17, lambda g: g.add("LayerNormalization", g.constant(8, 8), g.constant(8, 8), axis=2)),
    "LayerNormalization without bias": (17, lambda g: g.add("LayerNormalization", g.constant(8))),
    "RMSNormalization": (23, lambda g: g.add("RMSNormalization", g.constant(8))),
    "GroupNormalization 18": (18, norms("GroupNormalization", 2, 4, num_groups=4)),
    "GroupNormalization 21": (21, norms("GroupNormalization", 2, 8, num_groups=4)),
    "InstanceNormalization": (13, norms("InstanceNormalization", 2)),
    "LpNormalization": (13, lambda g: (g.add("Flatten"), g.add("LpNormalization", axis=1))),
    "LpNormalization of maps": (13, one("LpNormalization", axis=1, p=1)),
    "normalized rows": (13, normalize_rows),
    "Add a number": (13, with_constant("Add", value=0.3)),
    "Add channels": (13, with_constant("Add", 8, 1, 1)),
    "Add columns": (13, with_constant("Add", 8)),
    "Add pixels": (13, with_constant("Add", 8, 8, 8)),
    "Sub": (13, with_constant("Sub", 1, 8, 1, 1)),
    "Sub from a constant": (13, lambda g: g.add("Sub", g.last, after=g.constant(8, 1, 1))),
    "Mul": (13, with_constant("Mul", 8, 1, 1)),
    "Mul pixels": (13, with_constant("Mul", 1, 1, 8, 8)),
    "Div": (13, with_constant("Div", value=np.full((8, 1, 1), 3.0))),
    "Div of a constant": (13, lambda g: (g.add("Exp"), g.add("Div", g.last, after=g.constant(8, 1, 1)))),
    "Sum": (13, lambda g: g.add("Sum", g.last, g.constant(8, 1, 1), g.last)),
    "Mean": (13, lambda g: g.add("Mean", g.last, g.constant(8, 1, 1))),
    "Max": (13, with_constant("Max", value=0.1)),
    "Min": (13, with_constant("Min", value=0.1)),
    "Max of three": (13, lambda g: g.add("Max", g.constant(8, 1, 1), g.last)),
    "Clip both": (13, lambda g: g.add("Clip", g.constant(value=-0.5), g.constant(value=0.25))),
    "Clip from above": (13, lambda g: g.add("Clip", "", g.constant(value=0.25))),
    "Clip 7": (7, one("Clip", min=-0.5, max=3.4e38)),
    "Where": (13, lambda g: (g.add("Greater", g.constant(value=0.0)), g.add("Where", "conv0_0", g.constant(1)))),
    "softmax that is safe": (13, safe_softmax),
    "And, Or": (13, both_and_either),
    "Where of constants": (
        13,
        lambda g: g.add("Where", g.last, g.constant(1), after=g.constant(value=np.arange(8) % 2 == 0)),
    ),
    "Cast": (13, lambda g: (g.add("Cast", to=TensorProto.DOUBLE), g.add("Cast", to=TensorProto.FLOAT))),
    "PRelu of maps": (13, with_constant("PRelu", 8, 1, 1)),
    "PRelu of one": (13, with_constant("PRelu", 1)),
    "PRelu of columns": (13, with_constant("PRelu", 8)),
    "PRelu of pixels": (13, with_constant("PRelu", 8, 8, 8)),
    "ReduceMean 18": (18, lambda g: g.add("ReduceMean", ints(g, 2, 3), keepdims=0)),
    "ReduceMean of columns": (13, one("ReduceMean", axes=[-1])),
    "ReduceMax": (13, one("ReduceMax", axes=[2, 3])),
    "ReduceMax of channels": (13, one("ReduceMax", axes=[1])),
    "ReduceMin": (13, one("ReduceMin", axes=[1], keepdims=0)),
    "ReduceSum": (13, lambda g: g.add("ReduceSum", ints(g, 1))),
    "ReduceL1": (13, one("ReduceL1", axes=[1])),
    "ReduceL2": (13, one("ReduceL2", axes=[1])),
    "ReduceSumSquare": (13, one("ReduceSumSquare", axes=[2])),
    "GlobalMaxPool": (13, one("GlobalMaxPool")),
    "GlobalAveragePool": (13, one("GlobalAveragePool")),
    "Slice 9": (9, one("Slice", starts=[1], ends=[7], axes=[1])),
    "Slice": (13, lambda g: g.add("Slice", ints(g, 1, 0), ints(g, 9999, -1), ints(g, 2, 3), ints(g, 2, 1))),
    "Slice backwards": (13, lambda g: g.add("Slice", ints(g, -1), ints(g, -9), ints(g, 1), ints(g, -1))),
    "Slice each second backwards": (13, lambda g: g.add("Slice", ints(g, 6), ints(g, 1), ints(g, 1), ints(g, -2))),
    "Split": (13, split_and_maximum),
    "Split 18": (18, lambda g: (g.add("Split", outputs=3, axis=1, num_outputs=3), g.add("Neg"))),
    "Split 11": (11, lambda g: (g.add("Split", outputs=2, axis=1, split=[2, 6]), g.add("Neg"))),
    "Concat with a constant": (13, lambda g: (g.add("Flatten"), g.add("Concat", g.last, axis=1))),
    "Gather": (13, with_constant("Gather", value=np.array([3, 1, 1, 7]), axis=1)),
    "Gather in a row": (13, with_constant("Gather", value=np.array([3, 4, 5]), axis=1)),
    "Gather one": (13, with_constant("Gather", value=np.int64(-1), axis=2)),
    "Tile": (13, lambda g: g.add("Tile", ints(g, 1, 2, 1, 1))),
    "Expand": (13, lambda g: (g.add("GlobalAveragePool"), g.add("Expand", ints(g, 1, 8, 2, 3)))),
    "Unsqueeze and Squeeze": (13, lambda g: (g.add("Unsqueeze", ints(g, 1, -1)), g.add("Squeeze", ints(g, 1, 5)))),
    "Squeeze 9": (9, lambda g: (g.add("GlobalAveragePool"), g.add("Squeeze", axes=[2, 3]))),
    "Flatten from 2": (13, lambda g: (g.add("Flatten", axis=2), g.add("Reshape", ints(g, -1, 8, 64)))),
    "Transpose": (13, one("Transpose", perm=[0, 2, 3, 1])),
    "channel shuffle": (13, channel_shuffle),
    "weights last": (13, weights_last),
    "Pad": (13, lambda g: g.add("Pad", ints(g, 0, 0, 1, 2, 0, 0, 0, 1))),
    "Pad with a number": (13, lambda g: g.add("Pad", ints(g, 0, 0, 1, 2, 0, 0, 0, 1), g.constant(value=0.5))),
    "Pad channels": (13, lambda g: g.add("Pad", ints(g, 0, 2, 0, 0, 0, 2, 0, 0))),
    "Pad 18": (18, lambda g: g.add("Pad", ints(g, 1, 2), "", ints(g, 3))),
    "Pad 9": (9, one("Pad", pads=[0, 0, 1, 1, 0, 0, 2, 2])),
    "Pad reflect": (13, lambda g: g.add("Pad", ints(g, 0, 0, 1, 2, 0, 0, 0, 1), mode="reflect")),
    "Pad edge": (13, lambda g: g.add("Pad", ints(g, 0, 0, 1, 2, 0, 0, 0, 1), mode="edge")),
    "Resize nearest": (13, resized({"mode": "nearest"}, 2, 3)),
    "Resize of torch": (
        13,
        resized({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 2, 2),
    ),
    "Resize asymmetric": (13, resized({"coordinate_transformation_mode": "asymmetric"}, 3, 3)),
    "Resize down": (13, resized({"mode": "nearest"}, 0.5, 0.625)),
    "Resize linear": (13, resized({"mode": "linear"}, 2, 1.5)),
    "Resize linear with corners": (
        13,
        resized({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 2, 2),
    ),
    "Resize cubic": (13, resized({"mode": "cubic"}, 2, 2)),
    "Resize to sizes": (18, lambda g: g.add("Resize", "", "", ints(g, 16, 24), axes=[2, 3])),
    "Upsample": (9, with_constant("Upsample", value=np.array([1, 1, 2, 2], np.float32))),
    "DepthToSpace": (13, one("DepthToSpace", blocksize=2)),
    "DepthToSpace CRD": (13, one("DepthToSpace", blocksize=2, mode="CRD")),
    "Col2Im": (
        18,
        lambda g: (
            g.add("Reshape", ints(g, 0, 8, 64)),
            g.add("Col2Im", ints(g, 16, 16), ints(g, 2, 2), strides=[2, 2]),
        ),
    ),
    "SpaceToDepth": (13, one("SpaceToDepth", blocksize=2)),
    "Conv with uneven pads": (13, with_constant("Conv", 8, 8, 3, 3, pads=[0, 0, 1, 1])),
    "Conv SAME_UPPER": (13, with_constant("Conv", 8, 8, 3, 3, auto_pad="SAME_UPPER", strides=[2, 2])),
    "Conv SAME_LOWER": (13, with_constant("Conv", 8, 8, 4, 4, auto_pad="SAME_LOWER")),
    "Conv VALID": (13, with_constant("Conv", 8, 8, 3, 3, auto_pad="VALID")),
    "Conv in groups": (13, with_constant("Conv", 8, 2, 3, 3, group=4, dilations=[2, 2])),
    "Conv 1d": (
        13,
        lambda g: (g.add("Reshape", ints(g, 0, 8, 64)), g.add("Conv", g.constant(4, 8, 3), pads=[1, 0], strides=[2])),
    ),
    "ConvTranspose": (13, with_constant("ConvTranspose", 8, 4, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1])),
    "ConvTranspose in groups": (
        13,
        with_constant("ConvTranspose", 8, 2, 3, 3, group=4, strides=[2, 2], pads=[0, 1, 1, 0], output_padding=[1, 0]),
    ),
    "ConvTranspose SAME": (13, with_constant("ConvTranspose", 8, 4, 3, 3, strides=[2, 2], auto_pad="SAME_UPPER")),
    "MaxPool with uneven pads": (13, one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])),
    "MaxPool SAME": (13, one("MaxPool", kernel_shape=[2, 2], auto_pad="SAME_UPPER")),
    "MaxPool with wide pads": (13, one("MaxPool", kernel_shape=[3, 3], pads=[2, 2, 2, 2])),
    "AveragePool ceil": (
        19,
        one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1, count_include_pad=1),
    ),
    "MaxPool ceil": (13, one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "AveragePool with uneven pads": (13, one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])),
    "AveragePool counting pads": (
        13,
        one("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1),
    ),
    "BatchNormalization of rows": (
        13,
        lambda g: (
            g.add("GlobalAveragePool"),
            g.add("Flatten"),
            g.add("BatchNormalization", *(g.constant(8) for _ in range(3)), g.constant(value=np.ones(8))),
        ),
    ),
    "Gemm from the left": (13, lambda g: (g.add("Flatten"), g.add("Gemm", g.constant(512, 6), alpha=0.5))),
    "Gemm with a number": (
        13,
        lambda g: (g.add("Flatten"), g.add("Gemm", g.constant(512, 6), g.constant(1), beta=2.0)),
    ),
    "fully connected of MXNet": (
        13,
        lambda g: (g.add("Reshape", ints(g, 0, -1)), g.add("Gemm", g.constant(6, 512), g.constant(6), transB=1)),
    ),
    "MatMul of tokens": (13, with_constant("MatMul", 8, 5)),
    "MatMul from the left": (13, lambda g: g.add("MatMul", g.last, after=g.constant(5, 8))),
    "Einsum": (13, lambda g: g.add("Einsum", g.constant(8, 5), equation="nchw,wd->nchd")),
    "attention": (13, attention),
    "class token": (13, class_token),
    "Dropout and Identity": (13, lambda g: (g.add("Dropout"), g.add("Identity"))),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str, tmp_path: Path) -> None:
    opset, add = CASES[case]
    graph = small(opset)
    add(graph)
    rows(graph)
    agrees(graph.save(tmp_path / "net.onnx"))


LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "Resize nearest": (nn.Conv2d, qface.graph.UpsampleNearest, nn.Flatten),
    "Pad reflect": (nn.Conv2d, qface.graph.Pad, nn.Flatten),
    "Conv with uneven pads": (nn.Conv2d, qface.graph.Pad, nn.Conv2d, nn.Flatten),
    "Mul": (nn.Conv2d, qface.graph.ChannelAffine, nn.Flatten),
    "Clip both": (nn.Conv2d, nn.Hardtanh, nn.Flatten),
    "Gelu": (nn.Conv2d, nn.GELU, nn.Flatten),
    "ReduceMax": (nn.Conv2d, nn.MaxPool2d, nn.Flatten),
    "InstanceNormalization": (nn.Conv2d, nn.GroupNorm, nn.Flatten),
    "Gemm from the left": (nn.Conv2d, nn.Flatten, nn.Linear),
    "weights last": (nn.Conv2d, qface.graph.Pad, nn.Conv2d, qface.graph.ChannelAffine, nn.ReLU, nn.Flatten),
}


@pytest.mark.parametrize("case", LAYERS)
def test_operators_become_layers(case: str, tmp_path: Path) -> None:
    opset, add = CASES[case]
    graph = small(opset)
    add(graph)
    rows(graph)
    imported = qface.load(graph.save(tmp_path / "net.onnx"))
    called = [imported.get_submodule(node.target) for node in imported.graph.nodes if node.op == "call_module"]
    kinds = tuple(type(layer) for layer in called)
    assert kinds[: len(LAYERS[case])] == LAYERS[case]


@pytest.mark.parametrize(
    "case", ["attention", "class token", "Resize linear", "ConvTranspose", "Where", "weights last"]
)
def test_what_is_imported_can_be_saved_and_quantized(case: str, tmp_path: Path) -> None:
    opset, add = CASES[case]
    graph = small(opset)
    add(graph)
    graph.add("Flatten")
    path = graph.save(tmp_path / "net.onnx")
    imported = qface.load(path, preprocessing={"color": "RGB"})
    qface.save(imported, tmp_path / "net.safetensors")
    again = qface.load(tmp_path / "net.safetensors")
    images = preprocessing_of(imported)(random_faces(3))
    with torch.no_grad():
        assert torch.equal(imported(images), again(images))
    qface.calibrate(qface.quantize(imported), random_faces(8))


@pytest.mark.parametrize("batch", ["n", 1, 2])
@pytest.mark.parametrize("opset", [7, 11, 13, 18])
def test_rows_however_their_shape_is_written(opset: int, batch: int | str, tmp_path: Path) -> None:
    count = batch if isinstance(batch, int) else 0
    for number, shape in enumerate(([count, 512], [count, -1], [-1, 512], [0, -1])):
        if shape[0] == 0 == number:
            continue
        graph = small(opset, batch)
        graph.add("Reshape", ints(graph, *shape))
        graph.add("MatMul", graph.constant(512, 6))
        graph.add("Add", graph.constant(6))
        path = graph.save(tmp_path / f"{number}.onnx")
        if batch == 2:
            qface.load(path)
        else:
            imported = agrees(path)
            assert [type(layer) for layer in imported.children()] == [nn.Conv2d, nn.Flatten, nn.Linear]


def test_a_squeeze_that_drops_the_batch_of_one_image(tmp_path: Path) -> None:
    graph = small(13)
    graph.add("GlobalAveragePool")
    graph.add("Squeeze")
    agrees(graph.save(tmp_path / "net.onnx"))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_sizes_computed_as_it_runs(opset: int, tmp_path: Path) -> None:
    graph = small(opset)
    maps = graph.last
    axes = {"axes": [0]} if opset < 13 else {}
    graph.add("Shape")
    graph.add("Gather", graph.constant(value=np.int64(0)), axis=0)
    graph.add("Unsqueeze", *(() if axes else (ints(graph, 0),)), **axes)
    shape = graph.add("Concat", ints(graph, -1), axis=0)
    graph.add("Reshape", shape, after=maps)
    graph.add("MatMul", graph.constant(512, 6))
    imported = agrees(graph.save(tmp_path / "net.onnx"))
    assert [type(layer) for layer in imported.children()] == [nn.Conv2d, nn.Flatten, nn.Linear]


def test_weights_outside_the_file_in_half_precision(tmp_path: Path) -> None:
    graph = small(13)
    rows(graph)
    path = graph.save(tmp_path / "net.onnx")
    model = onnx.load(path)
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=16)
    agrees(tmp_path / "outside.onnx")
    model = onnx.load(path)
    halves = [
        numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float16), each.name)
        for each in model.graph.initializer
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(halves)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    imported = qface.load(tmp_path / "half.onnx")
    assert {each.dtype for each in imported.parameters()} == {torch.float32}


# ---- several outputs


def test_the_embedding_is_found_among_several_outputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = small(13)
    maps = graph.last
    graph.add("Flatten")
    embedding = graph.add("Gemm", graph.constant(512, 6))
    graph.add("ReduceL2", axes=[1], keepdims=1)
    norm = graph.last
    graph.add("Det", after=maps)  # nothing that the embedding needs
    path = graph.save(tmp_path / "net.onnx", outputs=(maps, norm, embedding))
    with caplog.at_level(logging.WARNING, "qface"):
        imported = qface.load(path)
    assert f"has 3 outputs; {embedding} [N, 6] is the embedding" in caplog.text
    assert imported(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 6)


def test_a_map_of_one_pixel_is_an_embedding(tmp_path: Path) -> None:
    graph = small(13)
    maps = graph.last
    embedding = graph.add("GlobalAveragePool")
    path = graph.save(tmp_path / "net.onnx", outputs=(maps, embedding))
    imported = qface.load(path)
    faces = as_image_source(random_faces(4))
    assert imported(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 8)
    assert np.allclose(embed(imported, faces), embed(path, faces), atol=1e-5)


def test_outputs_that_may_all_be_the_embedding_are_refused(tmp_path: Path) -> None:
    graph = small(13)
    first = graph.add("Flatten")
    second = graph.add("Gemm", graph.constant(512, 6))
    path = graph.save(tmp_path / "net.onnx", outputs=(first, second))
    with pytest.raises(
        UnsupportedLayerError, match=r"several of its outputs can be the embedding.*extract_model"
    ) as error:
        qface.load(path)
    assert "\n" not in str(error.value)


# ---- what is refused

REFUSED: dict[str, tuple[Callable[[Graph], object], str]] = {
    "an unknown operation": (one("Det"), "is a Det, which cannot be imported"),
    "a quantized file": (
        lambda g: g.add("QuantizeLinear", g.constant(value=np.float32(1)), g.constant(value=np.uint8(0))),
        "is quantized already",
    ),
    "weights that are computed": (
        lambda g: (g.add("Neg"), g.add("Conv", g.last, after="conv0_0")),
        "has the input neg1_0 that is computed from the image",
    ),
    "maps as an embedding": (lambda g: g.add("Relu"), r"the output relu1_0 has the shape \[N, 8, 8, 8\] instead of"),
    "one row of all images": (lambda g: g.add("Flatten", axis=0), r"the output flatten1_0 has the shape \[1, N\]"),
    "a part of the batch": (lambda g: g.add("Slice", ints(g, 0), ints(g, 1), ints(g, 0)), "has a slice of the batch"),
    "a constant for each image": (
        lambda g: (g.add("Shape"), g.add("Cast", to=TensorProto.FLOAT), g.add("Sqrt"), g.add("Mul", "conv0_0")),
        "depends on the batch size",
    ),
    "rows for each image in another order": (
        lambda g: (
            g.add("Shape"),
            g.add("Expand", g.last, after=g.constant(1, 8, 8, 8)),
            g.add("Transpose", perm=[1, 0, 2, 3]),
            g.add("Mul", "conv0_0"),
        ),
        "depends on the batch size",
    ),
    "a huge constant": (
        lambda g: (g.add("ConstantOfShape", after=ints(g, 100000, 100000)), g.add("Add", "conv0_0")),
        "needs 4e.10 bytes beyond the file size",
    ),
    "a huge range": (
        lambda g: (
            g.add("Range", ints(g), g.constant(value=np.int64(1)), after=g.constant(value=np.int64(0))),
            g.add("Add", "conv0_0"),
        ),
        "Range",
    ),
    "a text on a constant": (
        lambda g: (
            g.add("RegexFullMatch", after=g.constant(value=np.float32(1)), pattern="(a+)+b"),
            g.add("Add", "conv0_0"),
        ),
        "is a RegexFullMatch, which cannot be computed on constants",
    ),
    "another shape": (lambda g: g.add("Reshape", ints(g, -1, 7)), "has the invalid shape"),
    "wrap": (lambda g: g.add("Pad", ints(g, 0, 0, 1, 1, 0, 0, 1, 1), mode="wrap"), "the mode wrap"),
    "the resizing of TensorFlow": (
        resized({"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}, 2, 2),
        "linear with tf_crop_and_resize",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_named(case: str, tmp_path: Path) -> None:
    add, message = REFUSED[case]
    graph = small(19)
    add(graph)
    if case not in ("maps as an embedding", "one row of all images"):
        rows(graph)
    with pytest.raises((LimitError, UnsupportedLayerError), match=message) as error:
        qface.load(graph.save(tmp_path / "net.onnx"))
    assert "\n" not in str(error.value)


def test_loops_and_other_domains_are_refused(tmp_path: Path) -> None:
    graph = small(13)
    graph.nodes.append(helper.make_node("Gelu", [graph.last], ["other"], name="gelu", domain="com.microsoft"))
    graph.last = "other"
    rows(graph)
    with pytest.raises(UnsupportedLayerError, match=r"node gelu is a com\.microsoft\.Gelu, which cannot be imported"):
        qface.load(graph.save(tmp_path / "net.onnx"))
    graph = small(6)
    rows(graph)
    with pytest.raises(UnsupportedLayerError, match=r"has opset 6.*version_converter"):
        qface.load(graph.save(tmp_path / "net.onnx"))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        qface.load(tmp_path / "none.onnx")
    (tmp_path / "half.onnx").write_bytes(b"\x08\x08\x12\xff\xff\xff")
    with pytest.raises(CheckpointError, match="is not a complete ONNX file"):
        qface.load(tmp_path / "half.onnx")
    graph = Graph(shape=(1, 3))
    graph.add("Relu")
    with pytest.raises(CheckpointError, match=r"must have an input \[N, 3, height, width\]"):
        qface.load(graph.save(tmp_path / "rows.onnx"))
    with pytest.raises(CheckpointError, match="contains its own network"):
        qface.load(tmp_path / "rows.onnx", model=made("mobilefacenet"))
    graph = Graph()
    network(graph)
    graph.nodes[1].input[1] = "missing"
    with pytest.raises(CheckpointError, match="missing"):
        qface.load(graph.save(tmp_path / "missing.onnx"))


def test_our_own_files_say_what_they_read_and_how_they_were_made(tmp_path: Path) -> None:
    model = record_step(made("mobilefacenet"), "prune", {"ratio": 0.2})
    model.preprocessing = qface.Preprocessing(color="BGR", std=(128.0,) * 3)
    path = qface.export(model, tmp_path / "float.onnx")
    imported = qface.load(path)
    assert imported.preprocessing == model.preprocessing
    assert provenance_of(imported) == provenance_of(model)
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert difference(model(x), imported(x)) < 1e-5
    written = onnx.load(path)
    helper.set_model_props(written, {"provenance": "[1]"})
    onnx.save(written, path)
    with pytest.raises(CheckpointError, match="not a list of steps"):
        qface.load(path)


class Transformer(nn.Module):
    """A small vision transformer with a class token, as torch's own layers make it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions
        return F.normalize(self.head(self.block(tokens)[:, 0]))


class Windows(nn.Module):
    """Attention in windows with a mask for each of them, repeated for each image, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.scores = nn.Linear(8, 4)
        self.register_buffer("mask", torch.randn(4, 4, 4))
        self.bias = nn.Parameter(torch.randn(1, 4, 4))
        self.head = nn.Linear(8 * 16, 8)

    def forward(self, images: Tensor) -> Tensor:
        count = images.shape[0]
        windows = self.patches(images).permute(0, 2, 3, 1).reshape(-1, 4, 8)
        mask = self.mask.unsqueeze(0).expand(windows.shape[0] // 4, -1, -1, -1).reshape(-1, 4, 4)
        mask = mask + self.bias.expand(mask.shape[0], -1, -1)
        weights = (self.scores(windows) + mask).softmax(-1)
        return F.normalize(self.head((weights @ windows).reshape(count, -1)))


@pytest.mark.parametrize("opset", [14, 17, 20])
@pytest.mark.parametrize("make", [Transformer, Windows])
def test_a_vision_transformer(make: type[nn.Module], opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    path = tmp_path / "vit.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"data": {0: "n"}}
        images = torch.randn(2, 3, SIDE, SIDE)
        torch.onnx.export(
            model, (images,), path, opset_version=opset, dynamo=False, input_names=["data"], dynamic_axes=axes
        )
    agrees(path)


@pytest.mark.faces
def test_real_networks(faces: Path, tmp_path: Path) -> None:
    """MobileFaceNet with its normalization in the file: both ways to run it embed real faces as the original does."""
    model = qface.load(faces / "weights" / "mobilefacenet_112x96.safetensors")
    reads = preprocessing_of(model)

    class OfPixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.network((pixels - 127.5) * 0.0078125)

    path = tmp_path / "mobilefacenet.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(OfPixels().eval(), (torch.zeros(1, 3, 112, 96),), path, dynamo=False, opset_version=13)
    images = as_image_source(sorted((faces / "data" / "lfw").iterdir())[0])
    expected = embed(model, images)
    for other in (qface.load(path), path):
        np.testing.assert_allclose(embed(other, images), expected, atol=1e-4)
    assert preprocessing_of(qface.load(path)) == reads


def _without_outputs(model: onnx.ModelProto) -> None:
    del model.graph.node[0].output[:]


def _without_inputs(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[:]


def _other_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] += 1


def _text_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(
        helper.make_tensor(model.graph.initializer[0].name, TensorProto.STRING, [1], [b"text"])
    )


def _attribute(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(each for each in model.graph.node if each.op_type == "Conv")
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _renamed_output(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = name

    return change


def _batch(size: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size

    return change


DAMAGE: dict[str, Callable[[onnx.ModelProto], None]] = {
    "no outputs": _without_outputs,
    "no inputs": _without_inputs,
    "other dims": _other_dims,
    "text as weights": _text_weights,
    "group 0": _attribute("group", 0),
    "three pads": _attribute("pads", [1, 1, 1]),
    "a text as strides": _attribute("strides", "text"),
    "one stride": _attribute("strides", [1]),
    "stride 0": _attribute("strides", [0, 0]),
    "no output of the graph": lambda model: model.graph.ClearField("output"),
    "line break in a name": _renamed_output("an\noutput"),
    "a batch of 2**31": _batch(2**31),
    "no graph": lambda model: model.ClearField("graph"),
    "no opset": lambda model: model.ClearField("opset_import"),
}


def damaged(case: str, path: Path, metadata: dict[str, str]) -> Path:
    """Write a network with ``metadata`` and the damage ``case``."""
    graph = small(17)
    rows(graph)
    model = onnx.load(graph.save(path))
    helper.set_model_props(model, metadata)
    DAMAGE[case](model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_graph_is_one_line(case: str, tmp_path: Path) -> None:
    path = damaged(case, tmp_path / "net.onnx", {})
    with pytest.raises(QFaceError, match=r"net\.onnx") as error:
        qface.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("own", [False, True])
def test_a_damaged_graph_embeds_nothing(own: bool, case: str, tmp_path: Path) -> None:
    reads = Preprocessing(size=(32, 32)).to_json()
    path = damaged(
        case, tmp_path / "net.onnx", {"qface": "0", "input": "float32", "preprocessing": reads} if own else {}
    )
    with pytest.raises(QFaceError, match=r"net\.onnx") as error:
        OnnxEmbedder(path, threads=1)(torch.zeros(1, 3, 32, 32))
    assert "\n" not in str(error.value)


def test_an_operator_whose_name_is_no_text_is_one_line(tmp_path: Path) -> None:
    graph = small(17)
    rows(graph)
    path = graph.save(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes().replace(b"Conv", b"Co\xff\xfe"))
    for read in (qface.load, OnnxEmbedder):
        with pytest.raises(QFaceError, match=r"net\.onnx") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_size_whose_name_is_no_text_is_one_line(tmp_path: Path) -> None:
    graph = small(17, "batch_size")
    rows(graph)
    path = graph.save(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes().replace(b"batch_size", b"batch_s\xff\xfe\xe8"))
    with pytest.raises(QFaceError, match=r"net\.onnx") as error:
        OnnxEmbedder(path, threads=1)
    assert "\n" not in str(error.value)


def test_a_negative_size_is_dynamic(tmp_path: Path) -> None:
    graph = small(17)
    rows(graph)
    path = graph.save(tmp_path / "net.onnx")
    images = torch.randn(3, 3, 32, 32)
    expected = OnnxEmbedder(path, threads=1)(images)
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    batch.dim_value = -1
    onnx.save(model, path)
    assert torch.equal(OnnxEmbedder(path, threads=1)(images), expected)
    assert torch.allclose(qface.load(path)(images), expected, atol=1e-4)
