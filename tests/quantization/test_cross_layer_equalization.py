"""Channels brought to one range: the float network computes what it did, and rounding costs less."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, fx, nn

from qface.graph.layers import along_channels
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import CalibrationConfig, LSQFakeQuantize, QuantizationConfig, calibrate, quantize
from qface.quantization.cross_layer_equalization import cross_layer_equalization, find_regions
from qface.quantization.fake_quantize import quantizers
from tests.deployment.networks import CHANNELS, Gate, Sum, framed, prelu
from tests.networks import foreign_net, random_faces, tiny_face_net

SIDE = 24
FRAME = Preprocessing(size=(SIDE, SIDE))


def images(count: int = 8, seed: int = 0) -> Tensor:
    return FRAME(random_faces(count, seed=seed))


def sized(make: Callable[..., nn.Module]) -> nn.Module:
    return with_preprocessing(make(size=(SIDE, SIDE)), FRAME).eval()


def floating(model: nn.Module, bits: int = 6) -> fx.GraphModule:
    """A student that rounds nothing."""
    student = quantize(model, bits).eval()
    for quantizer in quantizers(student):
        quantizer.enable_fake_quant(False)
    return student


def uneven(layer: nn.Conv2d) -> nn.Conv2d:
    """Its output channels get ranges from 1 to 1000."""
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(0, 3, len(layer.weight)).view(-1, 1, 1, 1))
    return layer


def quantizer_behind(student: fx.GraphModule, layer: str) -> LSQFakeQuantize:
    (node,) = (each for each in student.graph.nodes if each.target == layer)
    (reader,) = node.users
    return cast(LSQFakeQuantize, student.get_submodule(str(reader.target)))


class Spread(nn.Module):
    """A depthwise convolution behind channels of all ranges, and a pointwise one behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.prelu = nn.Conv2d(8, 8, 3), prelu(0.2, -0.1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.relu, self.pointwise = nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.relu(self.depthwise(self.prelu(self.front(x)))))


BODIES: dict[str, Callable[[], nn.Module]] = {
    "depthwise": Spread,
    "residual": lambda: nn.Sequential(Sum(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 3)),
    "batch norm behind a sum": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 1), Sum(nn.Conv2d(8, 8, 3, padding=1)), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
    ),
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.LeakyReLU(), nn.Conv2d(8, 8, 3, groups=4)),
    "a gate": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), Gate(nn.Sigmoid()), nn.Conv2d(8, 8, 3)),
    "pools": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1)),
    "linear layers": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(8 * 144, 8), prelu(0.5, 0.1), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 8)
    ),
    "linear over pixels": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8)),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_float_network_computes_what_it_did(body: Callable[[], nn.Module]) -> None:
    student = floating(framed(body))
    with torch.no_grad():
        expected = student(images(seed=1))
        cross_layer_equalization(student, [images()])
        torch.testing.assert_close(student(images(seed=1)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_whole_networks_compute_what_they_did(make: Callable[..., nn.Module]) -> None:
    student = floating(sized(make))
    with torch.no_grad():
        expected = student(images(seed=1))
        cross_layer_equalization(student, [images()])
        torch.testing.assert_close(student(images(seed=1)), expected, rtol=1e-3, atol=1e-4)


def rounding_error(values: Tensor, bits: int) -> Tensor:
    """Mean squared error of each channel with the scale that suits all best, in parts of the channel's range."""
    channels = values.transpose(0, 1).flatten(1)
    ranges = channels.amax(1) - channels.amin(1)
    least = torch.full_like(ranges, torch.inf)
    for width in torch.linspace(0.3, 1, 15).tolist():
        for low in torch.linspace(0, 1, 15).tolist():
            step = width * float(ranges.max()) / (2**bits - 1)
            zero = round(low * (2**bits - 1))
            rounded = (channels / step).round().clamp(-zero, 2**bits - 1 - zero) * step
            errors = (rounded - channels).square().mean(1) / ranges.square()
            least = torch.where(errors.sum() < least.sum(), errors, least)
    return least


def test_channels_in_front_of_a_depthwise_convolution_share_a_scale_at_little_loss() -> None:
    model = framed(Spread)
    uneven(model.body.front)
    student = floating(model)
    seen: dict[str, Tensor] = {}
    student.get_submodule("body.prelu").register_forward_hook(lambda _, __, output: seen.update(values=output))
    with torch.no_grad():
        student(images())
        before = rounding_error(seen["values"], 6)
        cross_layer_equalization(student, [images()])
        student(images())
        after = rounding_error(seen["values"], 6)
    assert before.max() > 1e-2  # of the narrowest channel nothing is left
    assert after.max() < 1e-3


def test_a_channel_of_another_shape_gets_a_factor_of_its_own() -> None:
    """Channels of one range, half of them on one side of zero: the others must be narrower to fit the same integers."""
    model = framed(Spread)
    with torch.no_grad():
        model.body.front.weight[1:] = model.body.front.weight[0]
        model.body.front.bias.zero_()
        model.body.prelu.weight.fill_(0.9)
        model.body.prelu.weight[:4] = 0.01
    student = floating(model)
    quantizer = quantizer_behind(student, "body.prelu")
    seen: dict[str, Tensor] = {}
    quantizer.register_forward_hook(lambda _, __, output: seen.update(values=output))
    with torch.no_grad():
        student(images())
        before = rounding_error(seen["values"], 4).mean()
        cross_layer_equalization(student, [images()])
        student(images())
        after = rounding_error(seen["values"] - along_channels(quantizer.center, seen["values"]), 4).mean()
    assert after < before


def test_a_channel_around_another_mean_gets_a_zero_point_of_its_own() -> None:
    """Channels of one width on either side of zero: their ranges together are twice as wide as each of them."""
    model = framed(Spread)
    with torch.no_grad():
        model.body.front.weight[1:] = model.body.front.weight[0]
        model.body.front.bias.copy_(torch.tensor([-0.3, 0.3]).repeat(CHANNELS // 2))
        model.body.prelu.weight.fill_(0.9)
    student = quantize(model, 4).eval()
    calibrate(student, random_faces(8))
    quantizer = quantizer_behind(student, "body.prelu")
    assert quantizer.center is not None and len(quantizer.zero_point.unique()) > 1
    seen: list[Tensor] = []
    for each in quantizers(student):
        each.enable_fake_quant(False)
    with quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        student(images())
    for each in quantizers(student):
        each.enable_fake_quant()
    error = (quantizer(seen[0]) - seen[0]).square().mean()
    quantizer.center.zero_()  # one zero point for all
    calibrate(student, random_faces(8))
    assert (quantizer(seen[0]) - seen[0]).square().mean() > 2 * error


def test_the_side_with_fewer_bits_is_equalized_more() -> None:
    """Uneven activations in front of a convolution with even weights: what evens out one makes the other uneven."""

    def spread_of_weights(weight_bits: int, activation_bits: int) -> float:
        student = quantize(model, QuantizationConfig(weight_bits, activation_bits)).eval()
        for quantizer in quantizers(student):
            quantizer.enable_fake_quant(False)
        cross_layer_equalization(student, [images()])
        inputs = student.get_submodule("body.2").weight.detach().abs().amax((0, 2, 3))
        return float(inputs.max() / inputs.min())

    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.PReLU(8), nn.Conv2d(8, 8, 1)))
    with torch.no_grad():
        model.body[0].weight.mul_(torch.logspace(0, 1, 8).view(-1, 1, 1, 1))
        model.body[2].weight.fill_(0.1)
    narrow_weights, equal, narrow_activations = (spread_of_weights(*bits) for bits in ((4, 8), (6, 6), (8, 6)))
    assert 1 <= narrow_weights < 1.5 < equal < narrow_activations


def test_groups_end_where_a_factor_cannot_pass() -> None:
    student = quantize(framed(BODIES["a gate"]), 4)
    layers = dict(student.named_modules())
    sources = [source for region in find_regions(student) for source in region.sources]
    assert layers["body.0"] not in sources  # what it makes is multiplied by the gate
    assert layers["stem"] in sources


def test_all_parts_of_a_residual_chain_are_one_region() -> None:
    student = quantize(framed(BODIES["batch norm behind a sum"]), 8)
    layers = dict(student.named_modules())
    (region,) = (region for region in find_regions(student) if layers["body.0"] in region.sources)
    assert set(region.sources) == {layers["body.0"], layers["body.1.left"]}
    assert set(region.sinks) == {layers["body.1.left"], layers["body.2"]}
    assert all(isinstance(quantizer, LSQFakeQuantize) for quantizer in region.quantizers)


def test_channels_that_are_never_active_do_no_harm() -> None:
    model = framed(Spread)
    with torch.no_grad():
        model.body.front.weight[:3] = 0
        model.body.front.bias[:3] = 0
    student = floating(model)
    with torch.no_grad():
        expected = student(images())
        cross_layer_equalization(student, [images()])
        torch.testing.assert_close(student(images()), expected, rtol=1e-3, atol=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_zeros_have_no_signs() -> None:
    """A channel without weights may be 0 or -0, and 1 / -0 is not the largest number but the smallest."""
    torch.manual_seed(0)
    student = floating(framed(BODIES["residual"]))

    def silenced(quantizer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        (x,) = inputs
        if x.ndim < 4 or x.shape[1] < 8:
            return None
        silent = torch.where(torch.rand(x[:, :7].shape) < 5e-4, 1e-45, 0.0 * torch.randn(x[:, :7].shape))
        return torch.cat([silent, x[:, 7:]], 1)

    for quantizer in quantizers(student):
        quantizer.register_forward_pre_hook(silenced)
    with torch.no_grad():
        cross_layer_equalization(student, [images(64)])
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def test_uneven_channels_survive_low_bits_only_when_equalized() -> None:
    model = framed(Spread)
    uneven(model.body.front)
    faces = random_faces(16)
    with torch.no_grad():
        expected = model(images(8, seed=2))
        students = [
            calibrate(
                quantize(model, 6),
                faces,
                CalibrationConfig(len(faces), equalize=choice, gptq=False, correct_biases=False),
            ).eval()
            for choice in (False, True)
        ]
        x = images(8, seed=2)
        cosines = [torch.cosine_similarity(student(x), expected).mean() for student in students]
    assert 1 - cosines[1] < 0.7 * (1 - cosines[0])


class SpreadSum(nn.Module):
    """One map is added to all channels of another."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.one, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.many(x) + self.one(x))


def test_a_map_that_is_spread_over_channels_is_left_alone() -> None:
    student = calibrate(quantize(framed(SpreadSum)), random_faces(4))
    assert all(quantizer.calibrated for quantizer in quantizers(student))


def dead(channels: int) -> nn.Module:
    """The ReLU after the pool, which has bits of its own before it, lets nothing of the first ``channels`` through."""
    model = framed(lambda: nn.Sequential(nn.BatchNorm2d(8), nn.AvgPool2d(1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
    with torch.no_grad():
        model.body[0].bias[:channels] = -6.0
    return model


def mostly_negative() -> nn.Module:
    """Behind the activation function one channel is a hundredth of what it was before."""
    model = framed(
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.01), nn.Conv2d(8, 8, 3, padding=1))
    )
    with torch.no_grad():
        model.body[0].bias[0] = -6.0
    return model


@pytest.mark.parametrize("make", [lambda: dead(1), lambda: dead(4), mostly_negative], ids=["one", "half", "negative"])
@pytest.mark.parametrize("bits", [4, 6])
def test_what_an_activation_function_hides_keeps_its_steps_fine(make: Callable[[], nn.Module], bits: int) -> None:
    model = make()
    x = images(8, seed=2)
    with torch.no_grad():
        expected = model(x)
        lost = [
            1 - torch.cosine_similarity(student.eval()(x), expected).mean()
            for config in (CalibrationConfig(64, equalize=False), CalibrationConfig(64))
            for student in [calibrate(quantize(model, QuantizationConfig(8, bits)), random_faces(64), config)]
        ]
    assert lost[1] < 1.2 * lost[0]


def test_a_channel_that_wakes_on_other_images_is_not_clamped() -> None:
    """Never positive where calibration looks; on other images as large as any."""
    model = framed(lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    front = model.body[0]
    with torch.no_grad():
        front.bias[0] = -10 * model.stem(images()).abs().max()
        student = floating(model)
        cross_layer_equalization(student, [images()])
        factors = student.get_submodule("body.0").bias / front.bias
    assert factors[0] == pytest.approx(float(factors[1:].min()), rel=0.1)


class Transposed(nn.Module):
    """Linear layers over the channels of each pixel, whose features are the last dimension of three."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.wide, self.narrow = nn.Flatten(2), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.wide(self.flatten(x).transpose(1, 2))))


def test_features_of_tokens_are_no_channels() -> None:
    model = framed(Transposed)
    student = floating(model)
    with torch.no_grad():
        expected = student(images(seed=1))
        cross_layer_equalization(student, [images()])
        torch.testing.assert_close(student(images(seed=1)), expected, rtol=1e-3, atol=1e-5)
