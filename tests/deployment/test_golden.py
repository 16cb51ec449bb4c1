"""Golden values: the images that integers make, what ``export`` stores of them, and what ``selftest`` says."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

import qface
from qface.deployment.golden import (
    GoldenValues,
    Tolerance,
    embedding_digest,
    golden_image,
    golden_images,
    read_golden,
    write_golden,
)
from qface.deployment.metadata import add_metadata, read_metadata
from qface.errors import CheckpointError, ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.networks import Applied, calibrated, framed
from tests.networks import tiny_face_net

PREPROCESSING = Preprocessing(crop=(0, 8, 112, 104), size=(32, 28), color="BGR", std=(128.0, 127.0, 126.0))


def network() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=PREPROCESSING.size), PREPROCESSING)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qface.export(calibrated(network(), 6), tmp_path_factory.mktemp("golden") / "net.onnx", input="uint8")


@pytest.fixture
def copied(file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(file, tmp_path / "copy.onnx"))


# ---- images


def random_byte(plane: int, y: int, x: int) -> int:
    word = ((plane << 20) + (y << 10) + x) % 2**32
    word = (word ^ word // 2**16) * 0x7FEB352D % 2**32
    return (word ^ word // 2**15) * 0x846CA68B % 2**32 // 2**24


@settings(max_examples=20)
@given(st.integers(0, 681), st.integers(1, 40), st.integers(1, 40))
def test_an_image_is_interpolated_between_random_bytes(number: int, height: int, width: int) -> None:
    image = golden_image(number, (height, width))
    assert (image.dtype, image.shape) == (np.uint8, (3, height, width))
    for channel, y, x in np.ndindex(image.shape):
        plane, row, column = 6 * number + channel, y // 16, x // 16
        corners = [[random_byte(plane, row + below, column + right) for right in (0, 1)] for below in (0, 1)]
        across = np.array([1 - x % 16 / 16, x % 16 / 16])
        down = np.array([1 - y % 16 / 16, y % 16 / 16])
        smooth = down @ np.array(corners, float) @ across
        assert image[channel, y, x] == int(15 / 16 * smooth) + random_byte(plane + 3, y, x) // 16


def test_images_are_smooth_and_unlike_each_other() -> None:
    images = golden_images((112, 96), 6).float()
    assert images.shape == (6, 3, 112, 96)
    steps = images.diff(dim=-1).abs().mean()
    assert steps < 0.2 * images.std()
    assert images.flatten(1).corrcoef().triu(1).abs().max() < 0.5


def test_digest_is_crc_32() -> None:
    assert embedding_digest(np.frombuffer(b"123456789abc"[:8], "<f4")) == zlib.crc32(b"12345678") == 0x9AE0DAAF


# ---- what export stores


def expected_embeddings(path: Path, count: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = golden_images(PREPROCESSING.size, count)
    if session.get_inputs()[0].type == "tensor(float)":
        images = PREPROCESSING.normalize(images)
    return np.concatenate([session.run(None, {"images": image[None].numpy()})[0] for image in images])


@pytest.mark.parametrize("input", ["uint8", "float32"])
def test_integers_must_be_equal_everywhere(input: str, tmp_path: Path) -> None:
    path = qface.export(calibrated(network(), 6), tmp_path / "net.onnx", input=input)
    golden = read_golden(path)
    assert (golden.tolerance, golden.images) == ("equal", 16)
    expected = expected_embeddings(path, 16)
    assert np.array_equal(golden.embeddings, expected[:4])
    assert list(golden.digests) == [embedding_digest(row) for row in expected]
    assert qface.selftest(path).agrees


def test_both_inputs_give_the_same_values(file: Path, tmp_path: Path) -> None:
    path = qface.export(calibrated(network(), 6), tmp_path / "net.onnx", input="float32")
    assert read_golden(path).to_json() == read_golden(file).to_json()


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_face_net(size=PREPROCESSING.size)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.network(x))


FLOATS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], float]] = {
    "float network": (network, {}, 0.999),
    "float network of bytes": (network, {"input": "uint8"}, 0.999),
    "fp16": (lambda: calibrated(network(), 6), {"target": "cuda"}, 0.999),
    "float32": (lambda: calibrated(network(), 6), {"target": "float32"}, 0.999),
    "float island": (lambda: calibrated(framed(lambda: Applied(F.gelu)), 8), {}, 0.95),
    "length at the end": (lambda: calibrated(network(), 6), {"normalize": True}, 0.999999),
    "length": (lambda: calibrated(with_preprocessing(Normalized().eval(), PREPROCESSING), 6), {}, 0.999999),
}


@pytest.mark.parametrize("case", FLOATS)
def test_floats_have_a_tolerance_that_the_file_names(case: str, tmp_path: Path) -> None:
    build, options, tolerance = FLOATS[case]
    path = qface.export(build(), tmp_path / "net.onnx", **options)
    golden = read_golden(path)
    assert (golden.tolerance, len(golden.embeddings), golden.digests) == (tolerance, 4, ())
    found = qface.selftest(path)
    assert (found.agrees, found.images, found.different) == (True, 4, 0)
    assert found.min_cosine >= tolerance


def test_golden_values_take_little_room(file: Path) -> None:
    assert len(read_metadata(file)["golden"]) < 4 * (16 * 4 * 4 / 3 + 8) + 16 * 13 + 80


# ---- what selftest says


def shift_a_bias(path: Path) -> None:
    """Make ``path`` compute something else than its golden values."""
    model = onnx.load(path)
    tensor = next(each for each in model.graph.initializer if each.name.endswith("fc.bias"))
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def test_one_integer_more_is_a_difference(copied: Path) -> None:
    shift_a_bias(copied)
    found = qface.selftest(copied)
    assert not found.agrees
    assert (found.images, found.different) == (16, 16)
    assert 0.9 < found.min_cosine < 1
    assert str(found).startswith(
        "DIFFERS from what was trained: 16 of 16 embeddings differ, minimum cosine of the first 4"
    )
    assert found.to_dict()["agrees"] is False
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_difference_in_a_digest_counts(copied: Path) -> None:
    golden = read_golden(copied)
    digests = (golden.digests[0] ^ 1, *golden.digests[1:])
    write_golden(copied, GoldenValues(golden.tolerance, golden.embeddings, digests))
    found = qface.selftest(copied)
    assert (found.agrees, found.different, found.min_cosine) == (False, 1, 1.0)


@pytest.mark.parametrize(("tolerance", "different"), [("equal", 2), (0.9, 1), (0.7, 0)])
def test_embeddings_are_compared_by_the_tolerance(tolerance: Tolerance, different: int) -> None:
    golden = GoldenValues.of(tolerance, np.eye(3, dtype=np.float32))
    found = np.eye(3, dtype=np.float32)
    found[0, 1] = 0.1
    found[1, 2] = 0.9
    result = golden.compare(found, "a runtime")
    assert result.different == different
    assert result.min_cosine == pytest.approx(1 / np.sqrt(1.81))
    assert result.runtime in str(result)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
@pytest.mark.parametrize("tolerance", ["equal", 0.95])
def test_embeddings_without_a_direction_differ(value: float, tolerance: Tolerance) -> None:
    golden = GoldenValues.of(tolerance, np.ones((1, 4), np.float32))
    found = golden.compare(np.full((1, 4), value, np.float32), "a runtime")
    assert (found.agrees, found.min_cosine) == (False, 0.0)


def test_golden_values_survive_thresholds_and_other_metadata(copied: Path) -> None:
    graph = onnx.load(copied).graph
    add_metadata(copied, {"device": "door 3", "verified": "again"})
    assert qface.selftest(copied).agrees
    assert read_metadata(copied).items() >= {"device": "door 3", "verified": "again", "input": "uint8"}.items()
    assert onnx.load(copied).graph == graph


def test_files_without_golden_values_are_refused(copied: Path, tmp_path: Path) -> None:
    model = onnx.load(copied)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != "golden"}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, copied)
    with pytest.raises(CheckpointError, match="no golden values: export it again"):
        qface.selftest(copied)
    with pytest.raises(CheckpointError, match="no file"):
        qface.selftest(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(CheckpointError, match="not a complete ONNX file"):
        qface.selftest(tmp_path / "text.onnx")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 2, "tolerance": "equal", "embeddings": [], "digests": []}', "cannot be read"),
        ('{"version": 2, "tolerance": "equal", "embeddings": ["?"], "digests": [1]}', "cannot be read"),
        ('{"version": 2, "tolerance": "equal", "embeddings": ["AAAAAA=="], "digests": []}', "0 digests for 1"),
        ('{"version": 1}', "version 2, got 1: export again"),
    ],
)
def test_damaged_golden_values_are_refused(copied: Path, text: str, hint: str) -> None:
    add_metadata(copied, {"golden": text})
    with pytest.raises(CheckpointError, match=hint):
        qface.selftest(copied)


def test_an_unknown_provider_is_refused(file: Path) -> None:
    assert qface.selftest(file, ["CPUExecutionProvider"]).agrees
    with pytest.raises(ConfigError, match="NoSuchProvider"):
        qface.selftest(file, ["NoSuchProvider"])


def test_the_student_embeds_the_images_alike(tmp_path: Path) -> None:
    student = calibrated(network(), 6).eval()
    golden = read_golden(qface.export(student, tmp_path / "net.onnx"))
    with torch.no_grad():
        expected = student(PREPROCESSING.normalize(golden_images(PREPROCESSING.size)))
    assert torch.allclose(expected, torch.from_numpy(golden.embeddings), rtol=1e-5, atol=1e-6)
