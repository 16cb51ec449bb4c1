"""Thresholds that lie in a file: measured with one model on both sides, written, and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

import qface
from qface.data import TensorImages
from qface.deployment.metadata import add_metadata, read_metadata
from qface.errors import CheckpointError, ConfigError, ImagesError
from qface.evaluation import MatchThresholds, embed, match_thresholds, rates_at, tpr_at_fpr
from tests.conftest import Crops
from tests.networks import tiny_face_net

MEASURED = MatchThresholds({"1e-3": 0.5, "1e-4": 0.625}, 100, 20, 4800, "first-half")


def people(count: int = 40, each: int = 4) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count * each, 3, 112, 112, generator=generator) * 2 - 1
    return TensorImages(images, torch.arange(count).repeat_interleave(each))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 192])
    graph = helper.make_graph([helper.make_node("Flatten", ["images"], ["embedding"])], "net", [images], [embedding])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_thresholds_accept_what_they_promise() -> None:
    source, network = people(), tiny_face_net()
    found = match_thresholds(network, source, ("1e-2", "0.1", "1e-6"))
    assert list(found.by_fpr) == ["0.1", "1e-2"]  # too few pairs for a millionth
    assert (found.images, found.identities, found.impostor_pairs, found.people) == (160, 40, 160 * 156 // 2, None)
    assert source.labels is not None
    embeddings, labels = embed(network, source), source.labels.numpy()
    points = tpr_at_fpr(embeddings, labels, list(found.by_fpr))
    for fpr, threshold in found.by_fpr.items():
        assert threshold == points[fpr].threshold
        assert rates_at(threshold, embeddings, labels).fpr == pytest.approx(float(fpr), rel=0.01)


def test_people_are_chosen_and_named(crops: Crops) -> None:
    folder = crops({f"Person {number}": 3 for number in range(12)})
    found = match_thresholds(tiny_face_net(), folder, ["0.1"], identities="first-half")
    assert (found.images, found.identities, found.people) == (18, 6, "first-half")


def test_too_few_pairs_and_bad_rates_are_refused() -> None:
    with pytest.raises(ImagesError, match="FPR 1e-3 needs 10,000 impostor pairs, there are"):
        match_thresholds(tiny_face_net(), people(4), ["1e-3"])
    with pytest.raises(ImagesError, match="labeled images"):
        match_thresholds(tiny_face_net(), people(4).images)
    with pytest.raises(ConfigError, match="false-positive rate"):
        match_thresholds(tiny_face_net(), people(4), ["often"])


def test_thresholds_are_read_back(file: Path) -> None:
    add_metadata(file, {"verified": "by hand"})
    assert qface.thresholds_of(file) is None
    qface.write_thresholds(file, MatchThresholds({"1e-2": 0.25}, 10, 2, 25))
    qface.write_thresholds(file, MEASURED)
    assert qface.thresholds_of(file) == MEASURED
    assert read_metadata(file)["verified"] == "by hand"


def test_measured_thresholds_survive_json(file: Path) -> None:
    found = match_thresholds(tiny_face_net(), people(), ("1e-2",))
    qface.write_thresholds(file, found)
    read = qface.thresholds_of(file)
    assert read == found
    assert np.float32(read.by_fpr["1e-2"]) == read.by_fpr["1e-2"]


def test_thresholds_are_told_in_one_line() -> None:
    assert str(MEASURED) == (
        "two faces match above a cosine of 0.5000 (FPR 1e-3), 0.6250 (FPR 1e-4); measured on 100 images of 20 people, "
        "4,800 impostor pairs"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"by_fpr": 3}', '{"by_fpr": {"1e-3": "high"}}', '{"by_fpr": {}}'])
def test_damaged_thresholds_are_refused(file: Path, text: str) -> None:
    add_metadata(file, {"thresholds": text})
    with pytest.raises(CheckpointError, match=r"the thresholds in .* cannot be read"):
        qface.thresholds_of(file)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        qface.thresholds_of(tmp_path / "missing.onnx")
    with pytest.raises(CheckpointError, match="no file"):
        qface.write_thresholds(tmp_path / "missing.onnx", MEASURED)
