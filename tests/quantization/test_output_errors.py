"""Errors in the outputs of a student's layers, and the weights and biases that compensate for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qface.graph.queries import layer_of
from qface.models.patches import Positions, output_size, patches
from qface.quantization import CalibrationConfig, LayerBits, QuantizationConfig, calibrate, output_errors, quantize
from qface.quantization.fake_quantize import quantizers
from qface.quantization.quantized_layers import WeightedLayer
from tests.deployment.networks import framed
from tests.networks import foreign_net, random_faces, tiny_face_net
from tests.quantization.test_cross_layer_equalization import floating, images, sized

FACES = random_faces(64)


class _Outputs(fx.Interpreter):
    """The outputs of convolutions and linear layers, by node."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Tensor:
        result: Tensor = super().run_node(n)
        if isinstance(layer_of(n), WeightedLayer):
            self.found[n.name] = result
        return result


def outputs(network: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    interpreter = _Outputs(network)
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.found


def student(make: Callable[..., nn.Module], weight_bits: int, **settings: bool) -> fx.GraphModule:
    config = CalibrationConfig(equalize=False, **settings)
    return calibrate(quantize(sized(make), QuantizationConfig(weight_bits, 8)), FACES, config).eval()


def mean_distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return by how much the means of channels differ."""
    means = ((one.movedim(1, 0).flatten(1).mean(1) for one in (found[name], wanted[name])) for name in wanted)
    return float(sum((found - wanted).abs().mean() for found, wanted in means))


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_channels_get_back_their_means(make: Callable[..., nn.Module], gptq: bool) -> None:
    """Also on images that were not calibrated on."""
    x = images(64, seed=5)
    wanted = outputs(floating(sized(make), 3), x)
    before, after = (
        mean_distance(outputs(student(make, 3, gptq=gptq, correct_biases=correct), x), wanted)
        for correct in (False, True)
    )
    assert after < 0.7 * before


def test_a_layer_makes_up_for_the_errors_of_the_one_before_it() -> None:
    """The second layer undoes half of the error of the first, which is three quarters of the squared error."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    model = framed(lambda: layers)
    rounded = quantize(model, QuantizationConfig(8, 8, overrides={"body.0": LayerBits(weight=3)}))
    calibrate(rounded, FACES, CalibrationConfig(equalize=False)).eval()
    wanted, found = (outputs(network, images(16, seed=5)) for network in (floating(model, 8), rounded))
    first, second = (float((found[name] - wanted[name]).square().mean()) for name in ("body_0", "body_1"))
    assert second < 0.3 * first


def test_corrected_biases_bring_the_embeddings_closer() -> None:
    faces, held_out = random_faces(64), images(16, seed=5)
    model = sized(tiny_face_net)
    losses = []
    with torch.no_grad():
        for correct in (False, True):
            found = calibrate(quantize(model, 3), faces, CalibrationConfig(correct_biases=correct))
            losses.append(float((found.eval()(held_out) - model(held_out)).square().mean()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_correcting_biases_alone_changes_no_weight(make: Callable[..., nn.Module]) -> None:
    plain, corrected = (student(make, 3, gptq=False, correct_biases=correct) for correct in (False, True))
    for one, other in zip(plain.modules(), corrected.modules(), strict=True):
        if isinstance(one, WeightedLayer):
            assert torch.equal(one.weight, other.weight)


def test_only_a_new_student_is_rounded_and_corrected() -> None:
    found = calibrate(quantize(tiny_face_net(), 4), random_faces(8))
    layers = [layer for layer in found.modules() if isinstance(layer, WeightedLayer)]
    before = [value.clone() for layer in layers for value in layer.parameters(recurse=False)]
    calibrate(found, random_faces(8, seed=1))
    after = [value for layer in layers for value in layer.parameters(recurse=False)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(quantizer.calibrated for quantizer in quantizers(found))


def test_few_images_are_enough_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that do not fit are left out; the first always counts."""
    config = CalibrationConfig(num_images=8, batch_size=8)
    whole = calibrate(quantize(tiny_face_net(), 4), FACES[:8], config)
    monkeypatch.setattr(output_errors, "_MAX_BYTES", 1)
    short = calibrate(quantize(tiny_face_net(), 4), FACES[:8], config)
    assert all(torch.equal(value, short.state_dict()[name]) for name, value in whole.state_dict().items())
    less = calibrate(quantize(tiny_face_net(), 4), FACES, CalibrationConfig(batch_size=8))
    assert all(torch.isfinite(value).all() for value in less.state_dict().values())


def test_a_layer_that_is_called_twice_is_rounded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(torch.relu(self.layer(x))))

    found = calibrate(quantize(framed(Twice), 4), FACES)
    nodes = output_errors.weighted_nodes(found)
    assert len(nodes) == len({id(layer_of(node)) for node in nodes})
    assert len(nodes) == sum(isinstance(module, WeightedLayer) for module in found.modules())


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (5, 2, 3, 4)])
def test_a_linear_layer_has_the_positions_of_a_sequence(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(4, 6), torch.randn(shape)
    made = layer(x)
    size = output_size(layer, made.shape)
    positions = Positions.drawn(5, *size, 1000, torch.Generator().manual_seed(0))
    assert len(positions.image) == made[..., 0].numel()
    found = layer(patches(layer, x, positions))
    torch.testing.assert_close(found, made.reshape(-1, 6))
