from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from qface.data.images import Images
from qface.errors import ConfigError, ImagesError, QFaceError
from qface.graph import capture
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.provenance import provenance_of
from qface.quantization import (
    CalibrationConfig,
    LSQFakeQuantize,
    QuantizationConfig,
    calibrate,
    quantize,
    scale_parameters,
    set_observers,
)
from tests.networks import RANGES_ONLY, foreign_net, random_faces, tiny_face_net

SIZE = Preprocessing(size=(48, 48), std=(128.0,) * 3)
FACES = random_faces(12)


def student(bits: int | QuantizationConfig = 6, make: Callable[..., nn.Module] = tiny_face_net) -> fx.GraphModule:
    return quantize(captured(make), bits)


@cache
def captured(make: Callable[..., nn.Module]) -> fx.GraphModule:
    """The layers of a network, found once for all its students."""
    return capture(with_preprocessing(make(size=SIZE.size), SIZE))


def quantizers(model: nn.Module) -> list[LSQFakeQuantize]:
    return [module for module in model.modules() if isinstance(module, LSQFakeQuantize)]


def ranges(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for q in quantizers(model) for value in (q.scale, q.zero_point)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """A convolution of another batch size may sum in another order."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if a.is_floating_point() else 1)


@pytest.mark.parametrize(("wanted", "mirrored"), [(12, []), (16, [0, 4, 7, 11]), (100, range(12))])
def test_mirror_images_fill_up_a_small_set(wanted: int, mirrored: Sequence[int]) -> None:
    found = calibrate(student(), FACES, CalibrationConfig(num_images=wanted))
    filled = torch.cat([FACES, FACES[list(mirrored)].flip(3)])
    expected = calibrate(student(), filled, CalibrationConfig(num_images=len(filled)))
    check_close(ranges(found), ranges(expected))
    (step,) = [each for each in provenance_of(found) if each["step"] == "calibrate"]
    assert (step["images"], step["mirror_images"]) == (12, len(mirrored))


@pytest.mark.parametrize("gptq", [True, False])
def test_a_network_that_overflows_is_refused(gptq: bool) -> None:
    model = student()
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.ndim == 4).add_(3e38)
    with pytest.raises(QFaceError, match="are NaN or infinite: check its weights and preprocessing"):
        calibrate(model, FACES, CalibrationConfig(gptq=gptq))


@pytest.mark.parametrize("training", [True, False])
def test_it_sets_every_range_and_leaves_the_rest(training: bool) -> None:
    model = student().train(training)
    weights = [p.clone() for n, p in model.named_parameters() if not n.endswith("scale")]
    assert calibrate(model, FACES, RANGES_ONLY) is model
    assert model.training is training
    assert all(q.calibrated and not q.observing and q.quantizing for q in quantizers(model))
    assert all((q.scale > 0).all() for q in quantizers(model))
    assert same(weights, [p for n, p in model.named_parameters() if not n.endswith("scale")])
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in scale_parameters(model))
    before = ranges(model)
    model(3 * SIZE(FACES))  # observers are off
    assert same(ranges(model), before)
    assert provenance_of(model)[-1]["step"] == "calibrate"


@pytest.mark.parametrize("observer", ["mse", "minmax", "percentile", "moving_average"])
@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_8_bits_are_close_to_float(make: Callable[..., nn.Module], observer: str) -> None:
    weight_observer = "minmax" if observer == "moving_average" else observer
    model = student(QuantizationConfig(8, 8, weight_observer=weight_observer, activation_observer=observer), make)
    calibrate(model, FACES, CalibrationConfig(batch_size=4))
    x = SIZE(random_faces(8, seed=7))
    with torch.no_grad():
        expected = make(size=SIZE.size)(x)
        for training in (True, False):
            assert torch.cosine_similarity(model.train(training)(x), expected).min() > 0.99


def test_more_bits_are_closer_to_float() -> None:
    x = SIZE(random_faces(8, seed=7))
    with torch.no_grad():
        expected = tiny_face_net(size=SIZE.size)(x)
        errors = [
            1 - torch.cosine_similarity(calibrate(student(b), FACES).eval()(x), expected).mean() for b in (2, 4, 8)
        ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_it_repeats_and_repairs_itself() -> None:
    first, second = calibrate(student(), FACES), calibrate(student(), FACES)
    assert same(ranges(first), ranges(second))
    plain = CalibrationConfig(gptq=False, correct_biases=False)
    first, second = (calibrate(student(), FACES, plain) for _ in range(2))
    calibrate(second, random_faces(3, seed=8))
    assert not same(ranges(first), ranges(second))
    assert same(ranges(calibrate(second, FACES)), ranges(first))  # nothing of the other images is left


def test_ranges_are_those_of_float_values() -> None:
    """Rounding to 2 bits plays no part in them; half a gray level of the image does."""
    model = student(QuantizationConfig(2, 8, weight_observer="minmax", activation_observer="minmax"))
    calibrate(model, FACES, CalibrationConfig(len(FACES), equalize=False))
    seen: list[tuple[float, float]] = []
    teacher = tiny_face_net(size=SIZE.size)
    teacher.prelu.register_forward_hook(lambda _, __, out: seen.append((out.min().item(), out.max().item())))
    teacher(SIZE(FACES))
    node = next(n for n in model.graph.nodes if n.target == "prelu")
    quantizer = model.get_submodule(next(iter(node.users)).target)
    ((low, high),) = seen
    torch.testing.assert_close(quantizer.scale.item(), (high - low) / 255, rtol=0.01, atol=0)


def loader(images: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=5)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_all_kinds_of_images_give_the_same_ranges(crops: Callable[..., Path], batch_size: int) -> None:
    from qface.data.folders import ImageFolder

    folder = crops({"ann": 3, "bob": 4})
    pixels = ImageFolder(folder).read(range(7))
    kinds: list[Images] = [folder, str(folder), pixels, SIZE(pixels), loader(pixels), loader(SIZE(pixels)), [pixels]]
    config = QuantizationConfig(activation_observer="minmax")
    expected = ranges(calibrate(student(config), pixels, CalibrationConfig(7)))
    for images in kinds:
        found = ranges(calibrate(student(config), images, CalibrationConfig(7, batch_size)))
        check_close(found, expected)


def test_count_limits_the_images() -> None:
    config = QuantizationConfig(activation_observer="minmax")
    limit = CalibrationConfig(num_images=4)
    four = ranges(calibrate(student(config), FACES[:4], limit))
    check_close(ranges(calibrate(student(config), [FACES[:3], FACES[3:], FACES], limit)), four)
    spread = ranges(calibrate(student(config), FACES[[0, 4, 7, 11]], limit))
    assert same(ranges(calibrate(student(config), FACES, limit)), spread)


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 112, 112, dtype=torch.uint8), 3, [], ["x"], Path("missing")])
def test_unusable_images_leave_the_student_as_it_was(images: Any) -> None:
    model = calibrate(student(), FACES).eval()
    before = ranges(model)
    output = model(SIZE(FACES))
    with pytest.raises((ImagesError, ConfigError)) as caught:
        calibrate(model, images)
    assert "\n" not in str(caught.value)
    assert same(ranges(model), before)
    assert torch.equal(model(SIZE(FACES)), output)


def test_a_float_network_has_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        calibrate(tiny_face_net(), FACES)  # type: ignore[arg-type]


def test_observers_can_follow_training() -> None:
    model = calibrate(student(QuantizationConfig(activation_observer="minmax")), FACES)
    before = ranges(model)
    set_observers(model, True)
    assert all(q.observing for q in quantizers(model))
    model(3 * SIZE(FACES))
    set_observers(model, False)
    after = ranges(model)
    assert not same(before, after)
    model(9 * SIZE(FACES))
    assert same(after, ranges(model))


def test_scales_are_parameters_of_the_student() -> None:
    model = student()
    scales = scale_parameters(model)
    own = {id(parameter) for parameter in model.parameters()}
    assert len(scales) == len(quantizers(model)) > 10
    assert {id(scale) for scale in scales} <= own
    assert scale_parameters(tiny_face_net()) == []


def test_a_bias_far_beyond_the_weights_stays_representable() -> None:
    teacher = with_preprocessing(tiny_face_net(size=SIZE.size), SIZE)
    teacher.bn.weight.data[0] = 1e-9  # a channel that pruning might have left: nothing but its bias
    teacher.bn.bias.data[0] = 1.0
    model = calibrate(quantize(teacher, 8), FACES).eval()
    x = SIZE(FACES)
    assert torch.cosine_similarity(model(x), teacher(x)).min() > 0.99


def test_images_that_are_not_finite_are_refused() -> None:
    images = SIZE(FACES)
    images[3, 0, 5, 5] = float("nan")
    with pytest.raises(ImagesError, match="NaN or infinity"):
        calibrate(student(), images)


def test_floats_that_another_preprocessing_made_are_refused() -> None:
    """Bytes of 0 and 255 become -1 and 0.99 here; the image's quantizer would clamp all beyond."""
    crops = SIZE(FACES)
    calibrate(student(), crops)
    calibrate(student(), crops.double())
    for images in (crops * 2.2, crops - 0.5, torch.rand(4, 3, 48, 48) * 255):
        with pytest.raises(ImagesError, match=r"Preprocessing of the network gives -0\.996 to 0\.996"):
            calibrate(student(), images)


def test_images_of_several_sizes_or_types_are_refused() -> None:
    batches = [SIZE(FACES[:4]), torch.zeros(4, 3, 40, 40), FACES[4:8]]
    for second in batches[1:]:
        with pytest.raises(ImagesError, match="the images differ"):
            calibrate(student(), [batches[0], second])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_in_another_type_becomes_a_student_in_float32(dtype: torch.dtype) -> None:
    network = with_preprocessing(tiny_face_net(size=SIZE.size), SIZE).to(dtype)
    made = calibrate(quantize(network, 8), FACES)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    with torch.no_grad():
        cosines = torch.cosine_similarity(made.eval()(SIZE(FACES)), network.eval()(SIZE(FACES).to(dtype)).float())
    assert cosines.min() > 0.98
    assert next(network.parameters()).dtype is dtype


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_weights_calibrate_to_the_same_student(when: str) -> None:
    """Before or after they become a student; a grouped convolution is among the layers."""
    network = with_preprocessing(tiny_face_net(size=SIZE.size), SIZE)
    torch.manual_seed(0)  # of other weights the last bit may decide
    network.block1.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
    wanted = calibrate(quantize(network), FACES).state_dict()
    if when == "before":
        found = quantize(copy.deepcopy(network).to(memory_format=torch.channels_last))
    else:
        found = quantize(network).to(memory_format=torch.channels_last)
    found = calibrate(found, FACES).state_dict()
    scales = [name for name in wanted if name.endswith("scale")]
    torch.testing.assert_close({name: found[name] for name in scales}, {name: wanted[name] for name in scales})
    # The last bit of a learned scale may decide which fraction is nearest, and weights and biases follow that.
    torch.testing.assert_close(found, wanted, rtol=2.0**-10, atol=2.0**-10)
