"""``quantize``: which tensor of a student has how many bits, found by walking its graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qface.errors import ConfigError
from qface.graph.queries import is_quantized, source_of_values
from qface.models import IResNet, MobileFaceNet
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of
from qface.quantization import (
    ImageFakeQuantize,
    LayerBits,
    LSQFakeQuantize,
    QuantizationConfig,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
    calibrate,
    inspect,
    quantize,
)
from tests.networks import foreign_net, random_faces, tiny_face_net, with_statistics

SIZE = Preprocessing(size=(64, 64), std=(128.0,) * 3)


def tiny() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=SIZE.size), SIZE)


def foreign() -> nn.Module:
    return with_preprocessing(foreign_net(size=SIZE.size), SIZE)


def small_iresnet() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(IResNet((1, 1, 1, 1), 8)).eval()


def small_mobilefacenet() -> nn.Module:
    torch.manual_seed(0)
    return with_preprocessing(with_statistics(MobileFaceNet(8, SIZE.size)).eval(), SIZE)


class HandWritten(nn.Module):
    """Scalars, a pooled branch, and functions that have no layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.second = nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * 8 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * nn.functional.relu6(x + 3) / 6
        return self.fc(self.pool(self.second(torch.clamp(x, -1, 1))[:, :, :16, :16] - 0.1).flatten(1))


def hand_written() -> nn.Module:
    torch.manual_seed(0)
    return with_preprocessing(HandWritten().eval(), Preprocessing(size=(68, 68)))


NETWORKS = [tiny, foreign, small_iresnet, small_mobilefacenet]


def weighted(student: fx.GraphModule) -> dict[str, nn.Module]:
    return {n: m for n, m in student.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def called(student: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return student.get_submodule(str(node.target)) if node.op == "call_module" else None


def source_of(student: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that made the values of ``node``, past what only moves them."""
    return source_of_values(node)


def bits_read(student: fx.GraphModule) -> dict[str, int | str]:
    """Of each convolution and linear layer: the bits of what it reads, ``"image"``, or ``"float"``."""
    found: dict[str, int | str] = {}
    for node in student.graph.nodes:
        if isinstance(called(student, node), (nn.Conv2d, nn.Linear)):
            source = called(student, source_of(student, node.args[0]))
            kind = source.bits if isinstance(source, LSQFakeQuantize) else "float"
            found[str(node.target)] = "image" if isinstance(source, ImageFakeQuantize) else kind
    return found


def check_placement(student: fx.GraphModule, config: QuantizationConfig) -> None:
    layers = weighted(student)
    assert layers
    for name, layer in layers.items():
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        assert layer.weight_fake_quant.bits == config.weight_bits_of(name), name
        assert layer.weight_fake_quant.num_channels == len(layer.weight)
    bit_widths = bits_read(student)
    assert bit_widths.keys() == layers.keys()
    for name, bit_width in bit_widths.items():
        assert bit_width == "image" or (bit_width != "float" and bit_width <= config.activation_bits_of(name)), (
            name,
            bit_width,
        )

    narrow_allowed = {
        source_of(student, node.args[0]).target
        for node in student.graph.nodes
        if isinstance(called(student, node), (nn.Conv2d, nn.Linear))
    }
    for node in student.graph.nodes:
        quantizer = called(student, node)
        if isinstance(quantizer, LSQFakeQuantize) and node.target not in narrow_allowed:
            assert quantizer.bits == 8, node
        elif isinstance(quantizer, QuantizedPReLU):
            assert quantizer.weight_fake_quant.bits == 8
    output = next(node for node in student.graph.nodes if node.op == "output")
    assert not isinstance(called(student, output.args[0]), LSQFakeQuantize)


@pytest.mark.parametrize("config", [QuantizationConfig(), QuantizationConfig(4, 8), QuantizationConfig(8, 3)], ids=str)
@pytest.mark.parametrize("make", [*NETWORKS, hand_written])
def test_every_product_has_its_bits(make: Callable[[], nn.Module], config: QuantizationConfig) -> None:
    student = quantize(make(), config)
    assert is_quantized(student)
    check_placement(student, config)


@pytest.mark.parametrize("make", NETWORKS)
def test_overrides_change_single_layers(make: Callable[[], nn.Module]) -> None:
    layers = [n for n, m in make().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    overrides = {layers[0]: LayerBits(weight=8), layers[1]: LayerBits(activation=4), layers[-1]: LayerBits(2, 8)}
    config = QuantizationConfig(6, 6, overrides)
    student = quantize(make(), config)
    check_placement(student, config)
    bit_widths = bits_read(student)
    assert (bit_widths[layers[0]], bit_widths[layers[1]], bit_widths[layers[-1]]) == ("image", 4, 8)


def test_of_several_readers_the_narrowest_counts() -> None:
    config = QuantizationConfig(6, 6, {"left": LayerBits(activation=3), "right": LayerBits(activation=8)})
    bit_widths = bits_read(quantize(foreign(), config))
    assert bit_widths["left"] == bit_widths["right"] == 3


def test_the_image_keeps_its_bytes() -> None:
    student = quantize(tiny())
    (quantizer,) = (module for module in student.modules() if isinstance(module, ImageFakeQuantize))
    assert (quantizer.scale, quantizer.zero_point) == (1 / 128, 128)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(size=SIZE.size, mean=(123.7, 116.3, 103.5)),
        Preprocessing(size=SIZE.size, std=(58.4, 57.1, 57.4)),
        Preprocessing(size=SIZE.size, mean=(-5.0,) * 3),
        Preprocessing(size=SIZE.size, mean=(300.0,) * 3),
    ],
)
def test_an_image_without_a_common_scale_is_calibrated_at_8_bits(preprocessing: Preprocessing) -> None:
    student = quantize(with_preprocessing(tiny_face_net(size=SIZE.size), preprocessing), 4)
    assert not any(isinstance(module, ImageFakeQuantize) for module in student.modules())
    assert bits_read(student)["conv"] == 8
    calibrate(student, random_faces(4)).eval()
    assert student(preprocessing(random_faces(2))).isfinite().all()


@pytest.mark.parametrize("make", [tiny, foreign])
def test_the_teacher_is_untouched(make: Callable[[], nn.Module]) -> None:
    teacher = make()
    x = SIZE(random_faces(2))
    output = teacher(x)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = calibrate(quantize(teacher), random_faces(4))
    student.train()(x).sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert teacher.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(teacher(x), output)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_carries_preprocessing_and_a_record() -> None:
    student = quantize(tiny(), QuantizationConfig(5, 7))
    assert preprocessing_of(student) == SIZE
    (step,) = provenance_of(student)
    assert (step["step"], step["weight_bits"], step["activation_bits"]) == ("quantize", 5, 7)
    again, other = (provenance_of(quantize(each, 8))[0] for each in (tiny(), foreign()))
    assert again["source_sha256"] == step["source_sha256"] != other["source_sha256"]


@pytest.mark.parametrize("training", [False, True])
def test_all_parts_of_a_student_are_in_the_mode_of_the_teacher(training: bool) -> None:
    assert {part.training for part in quantize(tiny().train(training)).modules()} == {training}


def test_a_student_cannot_be_quantized_again() -> None:
    with pytest.raises(ConfigError, match="already"):
        quantize(quantize(tiny()))


def test_overrides_of_unknown_layers_are_named() -> None:
    for name in ("fc2", "bn", "prelu", ""):
        with pytest.raises(ConfigError) as caught:
            quantize(tiny(), QuantizationConfig(overrides={name: LayerBits(4), "fc": LayerBits(4)}))
        assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_layers_without_an_integer_form_stay_in_float() -> None:
    layers = (nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten())
    student = quantize(with_preprocessing(nn.Sequential(*layers).eval(), SIZE))
    assert [layer.kind for layer in inspect(student).float_layers] == ["conv_transpose2d"]
    assert bits_read(student) == {"0": "image", "2": 6}


def test_ignored_layers_stay_in_float() -> None:
    student = quantize(tiny(), QuantizationConfig(ignored_layers=("block1.*", "fc")))
    layers = {layer.name: layer.integer for layer in inspect(student).layers if layer.multiply_adds}
    assert {name for name, integer in layers.items() if not integer} == {"block1.conv1", "block1.conv2", "fc"}
    calibrate(student, random_faces(4))
    with pytest.raises(ConfigError, match=r"'nothing\.\*' matches no convolution"):
        quantize(tiny(), QuantizationConfig(ignored_layers=("nothing.*",)))
    with pytest.raises(ConfigError, match="tuple of names"):
        QuantizationConfig(ignored_layers="fc")  # type: ignore[arg-type]


def test_a_student_without_ranges_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        quantize(tiny())(SIZE(random_faces(1)))


@pytest.mark.parametrize("make", [tiny, foreign])
def test_a_copy_is_equal_and_independent(make: Callable[[], nn.Module]) -> None:
    student = calibrate(quantize(make(), 5), random_faces(4)).eval()
    x = SIZE(random_faces(3, seed=9))
    expected = student(x)
    copied = copy.deepcopy(student)
    assert torch.equal(copied(x), expected)
    assert preprocessing_of(copied) == SIZE and provenance_of(copied) == provenance_of(student)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(copied(x), expected)
    assert torch.equal(student(x), expected)
    # A layer of a copy rounds with the copy's quantizers, not with those it was copied from.
    fresh = copy.deepcopy(student)
    for module in student.modules():
        if isinstance(module, LSQFakeQuantize):
            module.scale.data.mul_(3)
    assert torch.equal(fresh(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(student))(x), student(x))


@pytest.mark.parametrize("make", [tiny, foreign])
def test_training_changes_what_is_deployed_as_it_says(make: Callable[[], nn.Module]) -> None:
    student = calibrate(quantize(make(), 6), random_faces(8))
    x = SIZE(random_faces(8, seed=2))
    student.train()
    target = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(student.parameters(), 0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = 1 - torch.cosine_similarity(student(x), target).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        trained, deployed = student(x), student.eval()(x)
    assert torch.cosine_similarity(trained, deployed).min() > 0.99
    assert not deployed.requires_grad
