"""The file computes the integers of the student, whatever the network is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qface
from qface.data.folders import ImageFolder
from qface.deployment import OnnxEmbedder
from qface.graph.capture import capture
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.quantization.fake_quantize import offset_range, quantizers
from qface.quantization.quantized_layers import WeightedLayer
from tests.deployment.integers import assert_exact, compare, optimized_operators
from tests.deployment.networks import (
    CHANNELS,
    SIDE,
    Applied,
    Framed,
    Gate,
    Joined,
    Sum,
    calibrated,
    framed,
    prelu,
    seeded,
)
from tests.networks import foreign_net, tiny_face_net

SMALL = Preprocessing(size=(32, 32))
FRAME = Preprocessing(size=(SIDE, SIDE))


BITS = [2, 6, 8]


def conv(*args: object, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, *args, **kwargs)  # type: ignore[arg-type]


def faded(layer: nn.Conv2d) -> nn.Conv2d:
    """A convolution with two output channels that training has all but removed."""
    with torch.no_grad():
        layer.weight[:2] *= torch.tensor([1e-12, 1e-30]).view(-1, 1, 1, 1)
        if layer.bias is not None:
            layer.bias[:2] = 0
    return layer


EXACT: dict[str, Callable[[], nn.Module]] = {
    "asymmetric kernels": lambda: nn.Sequential(
        conv((3, 1), (2, 1), (1, 0)), nn.ReLU(), conv((1, 5), (1, 2), (0, 2)), nn.ReLU(), conv((2, 3))
    ),
    "groups and dilation": lambda: nn.Sequential(
        conv(3, padding=2, dilation=2, groups=4), nn.ReLU(), conv(3, padding=1, groups=CHANNELS, bias=False)
    ),
    "slopes below 1": lambda: nn.Sequential(prelu(0.1, 0.9, 0.25), conv(3)),
    "slopes above 1": lambda: nn.Sequential(prelu(1.1, 1.9), conv(3)),
    "slopes on both sides of 1": lambda: nn.Sequential(prelu(0.1, 1.9, -0.3, -1.5, 1.0), conv(3)),
    "sums that convolutions read": lambda: nn.Sequential(
        *(nn.Sequential(conv(1), *(Sum(conv(3, padding=1)) for _ in range(3))) for _ in range(2))
    ),
    "negative slopes": lambda: nn.Sequential(prelu(-0.1, -1.9), conv(3)),
    "one slope": lambda: nn.Sequential(prelu(0.25), conv(3), prelu(1.5)),
    "ReLU6": lambda: nn.Sequential(conv(3), nn.BatchNorm2d(CHANNELS), nn.ReLU6(), conv(1), nn.ReLU6()),
    "BatchNorm before a convolution": lambda: nn.Sequential(
        Sum(nn.Sequential(nn.BatchNorm2d(CHANNELS), conv(3, padding=1), prelu(0.2, 1.2), conv(3, padding=1))), conv(1)
    ),
    "ReLU behind a sum": lambda: nn.Sequential(Sum(conv(3, padding=1), conv(1)), nn.ReLU(), conv(1)),
    "ReLU beside a shortcut": lambda: nn.Sequential(Sum(nn.ReLU()), conv(1)),
    "a tensor added to itself": lambda: nn.Sequential(Sum(nn.Identity()), conv(1)),
    "max pooling": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(1), nn.MaxPool2d(4, ceil_mode=True)),
    "linear layers": lambda: nn.Sequential(
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(72, 8), prelu(0.3, 1.3), nn.Linear(8, 8), nn.ReLU6()
    ),
    "three channels behind an activation": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 3, 1), nn.ReLU(), nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), conv(1)
    ),
    "BatchNorm behind flatten": lambda: nn.Sequential(nn.MaxPool2d(6), nn.Flatten(), nn.BatchNorm1d(32), nn.ReLU()),
    "padding behind each kind of layer": lambda: nn.Sequential(
        conv(1),
        conv(3, padding=1),
        prelu(0.1, 1.9, -0.3),
        conv((3, 1), (1, 2), (1, 0), groups=CHANNELS),
        prelu(0.2),
        Sum(nn.Sequential(nn.BatchNorm2d(CHANNELS), conv(3, padding=2, dilation=2, bias=False), prelu(0.3), conv(1))),
    ),
    "channels of hardly any weight": lambda: nn.Sequential(
        faded(conv(3)), conv(3, padding=1), faded(conv(1, bias=False)), prelu(0.2, 0.0, -0.3), conv(3, padding=1)
    ),
    "leaky ReLU": lambda: nn.Sequential(nn.LeakyReLU(0.2), conv(1)),
    "hard-swish": lambda: nn.Sequential(nn.Hardswish(), conv(1)),
    "SiLU": lambda: nn.Sequential(nn.SiLU(), conv(1)),
    "average pooling": lambda: nn.Sequential(
        nn.AvgPool2d(3, 2, 1), conv(1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "sigmoid gate": lambda: nn.Sequential(Gate(nn.Sigmoid()), conv(1)),
    "hard-sigmoid gate": lambda: nn.Sequential(Gate(nn.Hardsigmoid()), conv(1)),
    "two clamps of one convolution": lambda: nn.Sequential(Sum(nn.ReLU(), nn.ReLU6()), conv(1)),
    "product": lambda: nn.Sequential(Applied(lambda x: x * F.relu(x)), conv(1)),
    "concatenation": lambda: nn.Sequential(Joined(conv(1), conv(3, padding=1)), nn.ReLU(), nn.Conv2d(16, 8, 1)),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("body", EXACT)
def test_every_integer_is_equal(body: str, bits: int, tmp_path: Path) -> None:
    assert_exact(calibrated(captured(body), bits), tmp_path / "net.onnx")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("body", EXACT)
def test_every_integer_is_equal_with_a_zero_point_per_channel(body: str, bits: int, tmp_path: Path) -> None:
    student = with_drawn_zero_points(calibrated(captured(body), bits))
    if student is None:
        pytest.skip("no tensor of this network may have a zero point per channel")
    assert_exact(student, tmp_path / "net.onnx")


def with_drawn_zero_points(student: fx.GraphModule, seed: int = 0) -> fx.GraphModule | None:
    """``student`` with any zero point in each channel that may have its own; None if there is none."""
    generator = torch.Generator().manual_seed(seed)
    found = [quantizer for quantizer in quantizers(student) if quantizer.center is not None]
    for quantizer in found:
        low, high = quantizer.quant_min, quantizer.quant_max
        zero_point = torch.randint(low, high + 1, quantizer.zero_point.shape, generator=generator)
        quantizer.set_qparams(quantizer.scale.detach(), zero_point)
    return student if found else None


@pytest.mark.parametrize("bits", [bits for bits in BITS if bits < 8])
@pytest.mark.parametrize("body", EXACT)
def test_every_integer_is_equal_with_offsets_of_weights(body: str, bits: int, tmp_path: Path) -> None:
    student = calibrated(captured(body), bits)
    generator = torch.Generator().manual_seed(0)
    for layer in student.modules():
        if isinstance(layer, WeightedLayer):
            quantizer = layer.weight_fake_quant
            low, high = offset_range(bits, stride=2)
            offset = torch.randint(low, high + 1, quantizer.offset.shape, generator=generator)
            quantizer.set_weight_qparams(quantizer.scale.detach(), offset, stride=2)
    assert_exact(student, tmp_path / "net.onnx")


@cache
def captured(body: str) -> fx.GraphModule:
    """The network of EXACT, captured once for all bit widths."""
    return capture(framed(EXACT[body]))


@pytest.mark.parametrize("bits", BITS)
def test_residual_network_is_equal_also_once_it_was_saved(bits: int, tmp_path: Path) -> None:
    student = calibrated(with_preprocessing(tiny_face_net(bits, size=SMALL.size), SMALL), bits)
    assert_exact(student, tmp_path / "net.onnx")
    qface.save(student, tmp_path / "student.safetensors")
    loaded = qface.load(tmp_path / "student.safetensors")
    assert_exact(loaded, tmp_path / "loaded.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == (tmp_path / "loaded.onnx").read_bytes()


@st.composite
def convolutions(draw: st.DrawFn) -> Callable[[], nn.Module]:
    """One to three convolutions of any shape that fits, each with an activation function behind it."""
    specified = []
    for _ in range(draw(st.integers(1, 3))):
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        shape = {
            "stride": draw(st.sampled_from([1, (1, 2)])),
            "padding": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
            "dilation": draw(st.sampled_from([1, (2, 1)])),
            "groups": draw(st.sampled_from([1, 2, CHANNELS])),
            "bias": draw(st.booleans()),
        }
        slopes = draw(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=CHANNELS))
        kind = draw(st.sampled_from([nn.ReLU, nn.ReLU6, lambda slopes=slopes: prelu(*slopes)]))
        specified.append((kernel, shape, kind))

    def body() -> nn.Module:
        return nn.Sequential(*(part for kernel, shape, kind in specified for part in (conv(kernel, **shape), kind())))

    return body


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=convolutions(), bits=st.sampled_from([2, 4, 6]), seed=st.integers(0, 1000))
def test_any_convolutions_are_equal(body: Callable[[], nn.Module], bits: int, seed: int, tmp_path: Path) -> None:
    assert_exact(calibrated(framed(body, seed), bits), tmp_path / "net.onnx")


def test_foreign_network_agrees(tmp_path: Path) -> None:
    model = with_preprocessing(foreign_net(size=(64, 64)), Preprocessing(size=(64, 64)))
    assert_exact(calibrated(model, 6), tmp_path / "net.onnx")


def test_clamps_hold_where_the_range_is_wider(tmp_path: Path) -> None:
    model = framed(lambda: nn.Sequential(conv(3), nn.ReLU6(), conv(1), nn.ReLU()))
    with torch.no_grad():
        model.get_parameter("body.0.weight").mul_(50)
    student = calibrated(model)
    for layer, scale in (("body.1", 0.7), ("body.3", 0.1)):
        (user,) = next(node for node in student.graph.nodes if node.target == layer).users
        quantizer = student.get_submodule(str(user.target))
        low = quantizer.quant_min
        quantizer.set_qparams(torch.tensor([scale]), torch.tensor([low + 3]))
    compared, expected, embeddings = compare(student, tmp_path / "net.onnx")
    for tensor in compared:
        assert tensor.greatest_difference == 0, tensor.layer
    reached = {tensor.layer: (tensor.file.min(), tensor.file.max()) for tensor in compared}
    assert reached["body.0"] == (low + 3, low + 12)  # 6 / 0.7 is nearest to 9
    assert reached["body.2"][0] == low + 3
    assert torch.allclose(embeddings, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clamp", [nn.ReLU, nn.ReLU6])
def test_embeddings_may_be_clamped(clamp: type[nn.Module], tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(Framed(nn.MaxPool2d(4)), clamp()))
    with torch.no_grad():
        model.get_parameter("0.fc.weight").mul_(30)
    _, expected, embeddings = compare(calibrated(with_preprocessing(model, FRAME)), tmp_path / "net.onnx")
    assert torch.allclose(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert embeddings.min() == 0
    assert (embeddings.max() == 6) == (clamp is nn.ReLU6)


def test_prelu_of_a_float_is_equal(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Framed(nn.MaxPool2d(4))
            self.prelu = prelu(0.5, 1.5, -0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.net(x)
            return F.normalize(x) + self.prelu(x)

    assert_exact(calibrated(with_preprocessing(seeded(Mixed), FRAME)), tmp_path / "net.onnx")


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("body", ["ReLU6", "groups and dilation", "slopes on both sides of 1", "linear layers"])
def test_onnxruntime_multiplies_integers_only(body: str, bits: int, tmp_path: Path) -> None:
    student = calibrated(captured(body), bits)
    qface.export(student, tmp_path / "net.onnx")
    written = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    optimized = optimized_operators(tmp_path / "net.onnx", tmp_path)
    assert written["Conv"] and written["Gemm"] and not written["PRelu"]
    assert optimized["QLinearConv"] == written["Conv"]
    assert optimized["QGemm"] == written["Gemm"]


@pytest.mark.faces
def test_real_network_at_six_bits_embeds_as_its_student_does(
    faces: Path, mobilefacenet_file: Path, tmp_path: Path
) -> None:
    student = qface.load(mobilefacenet_file).eval()
    qface.export(student, tmp_path / "net.onnx")
    images = preprocessing_of(student)(ImageFolder(faces / "data" / "lfw", identities="second-half").read(range(64)))
    with torch.no_grad():
        expected = student(images)
    embeddings = OnnxEmbedder(tmp_path / "net.onnx", threads=1)(images)
    assert F.cosine_similarity(embeddings, expected).mean() >= 0.9999

    optimized = optimized_operators(tmp_path / "net.onnx", tmp_path)
    # From the image to the embedding nothing is computed in float: 49 layers and 33 PReLUs, sums and the embedding.
    # Of 12 sums 9 are made once more for the convolutions that read them beside the next one, which 3 others have too.
    # Sixteen padded convolutions read channels with different zero points: a Pad, and a maximum for the border.
    # Three sums are the only readers of a convolution, whose bytes they take as their own maximum, for OpenVINO.
    assert {kind: number for kind, number in optimized.items() if number > 2} == {
        "QLinearConv": 49 + 33 + 3,
        "Max": 33 + 3 + 16,
        "Pad": 1 + 16,
        "Clip": optimized["Clip"],
        "QLinearAdd": 12 + 9,
    }
    assert {kind for kind, number in optimized.items() if number <= 2} == {
        "Sub", "QuantizeLinear", "Transpose", "Flatten", "QGemm",
    }  # fmt: skip
