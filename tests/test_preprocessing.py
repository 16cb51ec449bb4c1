import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from qface.errors import ConfigError
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from tests.networks import random_faces

FLOATS = st.floats(-1000, 1000, width=32)
POSITIVE = st.floats(0.125, 1000, width=32)


@st.composite
def preprocessings(draw: st.DrawFn) -> Preprocessing:
    top, bottom = sorted(draw(st.sets(st.integers(0, 112), min_size=2, max_size=2)))
    left, right = sorted(draw(st.sets(st.integers(0, 112), min_size=2, max_size=2)))
    return Preprocessing(
        crop=(top, left, bottom, right),
        size=draw(st.tuples(st.integers(1, 224), st.integers(1, 224))),
        color=draw(st.sampled_from(["RGB", "BGR"])),
        mean=draw(st.tuples(FLOATS, FLOATS, FLOATS)),
        std=draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)),
    )


@given(preprocessings())
def test_json_keeps_every_field(preprocessing: Preprocessing) -> None:
    text = preprocessing.to_json()
    assert "\n" not in text
    assert Preprocessing.from_json(text) == preprocessing


@given(preprocessings())
def test_bytes_come_back_from_what_they_were_normalized_to(preprocessing: Preprocessing) -> None:
    pixels = torch.arange(256).byte().view(1, 1, 16, 16) + torch.tensor([0, 7, 99]).byte().view(1, 3, 1, 1)
    images = preprocessing.normalize(pixels)
    assert images.dtype == torch.float32
    assert torch.equal(preprocessing.to_bytes(images), pixels)


def test_bytes_are_rounded_and_clamped() -> None:
    preprocessing = Preprocessing(color="BGR", mean=(0.0, 100.0, 0.0), std=(2.0, 1.0, 1.0))
    images = torch.tensor([200.0, 0.6, -3.0]).view(1, 3, 1, 1)
    assert preprocessing.to_bytes(images).flatten().tolist() == [0, 101, 255]


def test_json_of_others_may_give_one_number_for_all_channels_and_leave_the_color_out() -> None:
    text = json.dumps({"crop": [0, 8, 112, 104], "size": [112, 96], "mean": 127.5, "std": 128})
    assert Preprocessing.from_json(text) == Preprocessing(
        (0, 8, 112, 104), (112, 96), "RGB", (127.5,) * 3, (128.0,) * 3
    )


def test_numbers_of_numpy_are_written_too() -> None:
    size, mean = np.array([64, 48]), np.full(3, 128, np.float32)
    numbers = Preprocessing(size=(size[0], size[1]), mean=(mean[0], mean[1], mean[2]))
    assert Preprocessing.from_json(numbers.to_json()) == Preprocessing(size=(64, 48), mean=(128.0,) * 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        '"RGB"',
        "null",
        "{}",
        '{"crop": [0, 0, 112, 112], "size": [112, 112], "mean": 0}',
        '{"crop": [0, 0, 112], "size": [112, 112], "mean": 0, "std": 1}',
        '{"crop": [0, 0, 112, 112], "size": [112, 112], "mean": [1, 2], "std": 1}',
        '{"crop": [0, 0, 112, 112], "size": [112, 112], "mean": "x", "std": 1}',
        '{"crop": [0, 0, 112, 112], "size": [112, 112], "mean": NaN, "std": 1}',
        '{"crop": [0, 0, 112, Infinity], "size": [112, 112], "mean": 0, "std": 1}',
    ],
)
def test_broken_json_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocessing.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": (0, 0, 113, 112)},
        {"crop": (0, -1, 112, 112)},
        {"crop": (50, 0, 50, 112)},
        {"crop": (0, 60, 112, 50)},
        {"crop": (0, 0, 112)},
        {"size": (0, 112)},
        {"size": (112,)},
        {"size": 112},
        {"size": (112.0, 112.0)},
        {"crop": 4},
        {"mean": 127.5},
        {"std": ("1", "1", "1")},
        {"color": "GBR"},
        {"color": "rgb"},
        {"mean": (0.0, 0.0)},
        {"mean": (float("nan"), 0.0, 0.0)},
        {"std": (1.0, 1.0, 0.0)},
        {"std": (1.0, -1.0, 1.0)},
        {"std": (1.0, float("nan"), 1.0)},
        {"std": (1.0, float("inf"), 1.0)},
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Preprocessing(**fields)


@given(preprocessings(), st.integers(0, 2**32 - 1))
def test_without_resizing_it_is_a_slice_and_a_division(preprocessing: Preprocessing, seed: int) -> None:
    top, left, bottom, right = preprocessing.crop
    same_size = Preprocessing(
        preprocessing.crop, (bottom - top, right - left), preprocessing.color, preprocessing.mean, preprocessing.std
    )
    crops = np.random.default_rng(seed).integers(0, 256, (2, 3, 112, 112), dtype=np.uint8)
    pixels = crops[:, :, top:bottom, left:right].astype(np.float32)
    if preprocessing.color == "BGR":
        pixels = pixels[:, ::-1]
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    result = same_size(torch.from_numpy(crops))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), (pixels - mean) / std, rtol=1e-6)


def test_another_size_resizes_the_crop() -> None:
    crops = random_faces(2)
    half = Preprocessing(size=(56, 56), mean=(0.0,) * 3, std=(1.0,) * 3)(crops)
    assert half.shape == (2, 3, 56, 56)
    averaged = nn.functional.avg_pool2d(crops.float(), 2)  # what bilinear means at exactly half the size
    torch.testing.assert_close(half, averaged)


def test_a_model_carries_it_and_without_one_reads_the_default() -> None:
    model = nn.Conv2d(3, 4, 1)
    assert preprocessing_of(model) == Preprocessing()
    other = Preprocessing(color="BGR")
    assert with_preprocessing(model, other) is model
    assert preprocessing_of(model) == other


def test_copies_of_graphs_keep_their_own() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with_preprocessing(graph, Preprocessing(color="BGR"))
    copied = copy.deepcopy(graph)
    assert preprocessing_of(copied) == Preprocessing(color="BGR")
    with_preprocessing(copied, Preprocessing(size=(112, 96)))
    assert preprocessing_of(copy.deepcopy(graph)) == Preprocessing(color="BGR")
    assert preprocessing_of(copy.deepcopy(copied)) == Preprocessing(size=(112, 96))
