"""``sensitivity``: each loss is that of the whole network, run with only that tensor's quantizer on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qface
from qface.errors import ConfigError, ImagesError
from qface.mixed_precision import BIT_WIDTHS, LayerSensitivity, Sensitivity, sensitivity
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import (
    CalibrationConfig,
    LSQFakeQuantize,
    QuantizationConfig,
    calibrate,
    quantize,
    set_observers,
)
from qface.quantization.quantized_layers import WeightedLayer
from tests.networks import foreign_net, random_faces, tiny_face_net

SIZE = Preprocessing(size=(48, 48), std=(128.0,) * 3)
FACES = random_faces(6)


def network(make: Callable[..., nn.Module] = tiny_face_net) -> nn.Module:
    return with_preprocessing(make(size=SIZE.size), SIZE)


def calibrated(bits: int | QuantizationConfig = 6, make: Callable[..., nn.Module] = tiny_face_net) -> fx.GraphModule:
    ranges_only = CalibrationConfig(equalize=False, gptq=False, correct_biases=False)
    return calibrate(quantize(network(make), bits), FACES, ranges_only)


def layers(student: fx.GraphModule) -> dict[str, Any]:
    """Every layer that multiplies, by its name."""
    return {name: layer for name, layer in student.named_modules() if isinstance(layer, WeightedLayer)}


def switched_off(student: fx.GraphModule) -> fx.GraphModule:
    for module in student.eval().modules():
        if hasattr(module, "enable_fake_quant"):
            module.enable_fake_quant(False)
    return student


@torch.no_grad()
def loss_with(student: fx.GraphModule, quantizer: LSQFakeQuantize) -> float:
    """What it costs that ``quantizer`` rounds, while ``student`` and whatever follows ``quantizer`` is switched off."""
    plain = student(SIZE(FACES)).double()
    rounding = copy.deepcopy(quantizer)
    rounding.enable_fake_quant()
    handle = quantizer.register_forward_hook(lambda _, inputs, output: rounding(inputs[0]))
    changed = student(SIZE(FACES)).double()
    handle.remove()
    return float((1 - F.cosine_similarity(plain, changed)).mean())


def row(table: Sensitivity, name: str) -> LayerSensitivity:
    (found,) = (layer for layer in table.layers if layer.name == name)
    return found


@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
@pytest.mark.parametrize("bits", [2, 5])
def test_losses_are_those_of_the_whole_network_with_one_quantizer_on(make: Callable[..., nn.Module], bits: int) -> None:
    student = calibrated(bits, make)
    table = sensitivity(student, FACES, weight_bits=(bits,), activation_bits=(bits,))
    switched_off(student)
    assert {layer.name for layer in table.layers} == set(layers(student))
    for name, layer in layers(student).items():
        weight, activation = row(table, name).weight, row(table, name).activation
        assert weight == {bits: pytest.approx(loss_with(student, layer.weight_fake_quant), rel=1e-3, abs=1e-9)}
        (read,) = layer.quant_context.inputs
        expected = {bits: loss_with(student, read)} if isinstance(read, LSQFakeQuantize) else {}
        assert activation == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_ranges_at_other_bits_are_chosen_as_calibrate_does() -> None:
    chosen = sensitivity(calibrated(8), FACES, weight_bits=(3,), activation_bits=(3,))
    own = sensitivity(calibrated(3), FACES, weight_bits=(3,), activation_bits=(3,))
    for one, other in zip(chosen.layers, own.layers, strict=True):
        # The scales of a student of these bits are moved to fractions, those tried here are not.
        assert one.weight == pytest.approx(other.weight, rel=5e-3)
        # Calibration sees the image in bytes, half a gray level darker.
        assert one.activation == pytest.approx(other.activation, rel=0.3)


def test_every_layer_has_a_row_in_the_order_in_which_they_run() -> None:
    table = sensitivity(network(), FACES)
    names = ["conv", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "fc"]
    assert [layer.name for layer in table.layers] == names
    assert [layer.elements for layer in table.layers[:2]] == [8 * 3 * 9, 8 * 8 * 9]
    assert table.images == len(FACES)
    for layer in table.layers:
        assert tuple(layer.weight) == BIT_WIDTHS
        assert tuple(layer.activation) == (() if layer.name == "conv" else BIT_WIDTHS)
        for losses in filter(None, (layer.weight, layer.activation)):
            assert 0 <= losses[8] < losses[4] < losses[2] < 2


def test_layers_that_read_one_tensor_share_its_losses() -> None:
    table = sensitivity(network(foreign_net), FACES, weight_bits=(4,), activation_bits=(3, 4))
    assert row(table, "left").activation == row(table, "right").activation
    assert row(table, "left").weight != row(table, "right").weight


def test_the_student_is_left_as_it_is() -> None:
    student = calibrated()
    student.train()
    set_observers(student, True)
    before, switches = copy.deepcopy(student.state_dict()), [module.training for module in student.modules()]
    sensitivity(student, FACES, weight_bits=(4,), activation_bits=(4,))
    after = student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [module.training for module in student.modules()] == switches


def test_a_float_network_counts_as_its_student() -> None:
    model = network()
    assert sensitivity(model, FACES) == sensitivity(quantize(model), FACES)


def test_ranges_of_the_student_count_at_its_own_bits() -> None:
    student = calibrated(6)
    before = sensitivity(student, FACES, weight_bits=(5, 6), activation_bits=(5, 6))
    layer = layers(student)["fc"]
    for quantizer in (layer.weight_fake_quant, *layer.quant_context.inputs):
        quantizer.scale.data.mul_(3)
    after = sensitivity(student, FACES, weight_bits=(5, 6), activation_bits=(5, 6))
    for name in ("weight", "activation"):
        old, new = getattr(row(before, "fc"), name), getattr(row(after, "fc"), name)
        assert new[5] == old[5]
        assert new[6] > 2 * old[6]


def test_the_rule_of_the_student_chooses_the_ranges() -> None:
    config = QuantizationConfig(weight_observer="minmax", activation_observer="minmax")
    least, whole = (sensitivity(quantize(network(), c), FACES, weight_bits=(3,)) for c in (6, config))
    assert row(least, "fc").weight[3] < row(whole, "fc").weight[3]


def test_batches_do_not_matter() -> None:
    together = sensitivity(network(), FACES, activation_bits=(), batch_size=6)
    apart = sensitivity(network(), FACES, activation_bits=(), batch_size=4)
    for one, other in zip(together.layers, apart.layers, strict=True):
        assert one.weight == pytest.approx(other.weight, rel=1e-3, abs=1e-9)


def test_only_some_images_are_read() -> None:
    def endless() -> Any:
        while True:
            yield SIZE(FACES)

    few = sensitivity(network(), FACES, weight_bits=(4,), activation_bits=(), num_images=3)
    assert few.images == 3
    assert sensitivity(network(), endless(), weight_bits=(4,), activation_bits=(), num_images=8).images == 8
    assert few == sensitivity(
        network(), FACES[[0, 2, 5]], weight_bits=(4,), activation_bits=()
    )  # evenly, halves to even


def test_only_what_is_asked_for_is_measured() -> None:
    table = sensitivity(network(), FACES, weight_bits=(), activation_bits=(2,))
    assert all(not layer.weight for layer in table.layers)
    assert all(tuple(layer.activation) == (2,) for layer in table.layers[1:])


def test_bits_count_once() -> None:
    twice = sensitivity(network(), FACES, weight_bits=(4, 2, 4), activation_bits=(3, 3))
    assert twice == sensitivity(network(), FACES, weight_bits=(2, 4), activation_bits=(3,))


def test_a_result_fits_into_json() -> None:
    table = sensitivity(network(), FACES, weight_bits=(2, 8), activation_bits=(4,))
    record = json.loads(json.dumps(table.to_dict()))
    assert record == table.to_dict()
    assert record["images"] == 6
    assert record["layers"][-1]["name"] == "fc"
    assert record["layers"][-1]["weight"]["2"] == row(table, "fc").weight[2]


@pytest.mark.parametrize("bit_widths", [{"weight_bits": (1,)}, {"activation_bits": (4, 9)}])
def test_bits_out_of_range_are_refused(bit_widths: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="from 2 to 8"):
        sensitivity(network(), FACES, **bit_widths)


@pytest.mark.parametrize("images", ["absent", None, []])
def test_images_that_are_missing_are_refused(images: Any) -> None:
    with pytest.raises(ImagesError):
        sensitivity(network(), images)


@pytest.mark.faces
def test_the_first_depthwise_convolution_of_mobilefacenet_needs_its_bits(faces: Path) -> None:
    teacher = qface.load(faces / "weights" / "mobilefacenet_112x96.safetensors")
    table = sensitivity(
        teacher,
        faces / "data" / "lfw",
        "first-half",
        weight_bits=(2, 8),
        activation_bits=(),
        num_images=4,
        batch_size=8,
    )
    worst = max(table.layers, key=lambda layer: layer.weight[2])
    assert worst.name == "dw_conv1.conv"
    assert worst.weight[8] < 1e-3 < 0.1 < worst.weight[2]


def test_weights_that_calibration_has_rounded_are_refused() -> None:
    student = calibrate(quantize(network()), FACES)
    with pytest.raises(ConfigError, match="pass the float network"):
        sensitivity(student, FACES)
    assert sensitivity(student, FACES, weight_bits=(), activation_bits=(6,)).layers


def test_no_images_at_a_time_is_an_error() -> None:
    with pytest.raises(ConfigError, match="batch_size must be an integer >= 1, got 0"):
        sensitivity(network(), FACES, batch_size=0)


def test_a_measurement_that_was_stopped_goes_on(tmp_path: Path) -> None:
    network, faces = tiny_face_net(), random_faces(8)
    whole = sensitivity(network, faces, batch_size=4, run_dir=tmp_path)
    file = tmp_path / "losses.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:4])
    assert sensitivity(network, faces, batch_size=4, run_dir=tmp_path) == whole
    assert file.read_text() == "".join(lines)
    assert sensitivity(network, faces, batch_size=4) == whole
    with pytest.raises(ConfigError, match="run with different images: delete it, or choose another run folder"):
        sensitivity(network, random_faces(6), batch_size=4, run_dir=tmp_path)
