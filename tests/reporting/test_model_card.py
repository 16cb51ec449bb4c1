"""``model_card``: what it says of a file, and the code in it, which runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import qface
from qface.cli import main
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import CheckpointError, ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.provenance import provenance_of
from tests.networks import random_faces, tiny_face_net

Crops = Callable[..., Path]
SIZE = Preprocessing(size=(112, 96), crop=(0, 8, 112, 104), color="BGR", mean=(120.0, 125.0, 130.0), std=(128.0,) * 3)


def network() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=SIZE.size), SIZE)


def exported(path: Path, bits: int = 6, **options: Any) -> Path:
    return qface.export(qface.calibrate(qface.quantize(network(), bits), random_faces()), path, **options)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(6, {}), (6, {"input": "uint8"}), (8, {}), (4, {"target": "float32"}), (6, {"normalize": True})],
    ids=str,
)
def test_the_code_of_a_card_gives_the_embeddings_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, options: dict[str, Any]
) -> None:
    file = exported(tmp_path / "student.onnx", bits, **options)
    faces = random_faces(2, seed=1)
    for name, face in zip(("one.png", "another.png"), faces, strict=True):
        Image.fromarray(face.permute(1, 2, 0).numpy()).save(tmp_path / name)
    found = re.search(r"```python\n(.*?)```", qface.model_card(file), re.DOTALL)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(found[1], scope)
    wanted = torch.nn.functional.normalize(OnnxEmbedder(file)(SIZE(faces))).numpy()
    for name, row in zip(("one.png", "another.png"), wanted, strict=True):
        np.testing.assert_allclose(scope["embed"](name), row, atol=1e-6)


def test_a_card_has_front_matter_and_says_how_the_file_was_made(tmp_path: Path, crops: Crops) -> None:
    folder = crops({"ann": 3, "bob": 2, "carl": 4}, folder="my_faces")
    people = tmp_path / "people.txt"
    people.write_text("ann\ncarl\n")
    student = qface.calibrate(qface.quantize(network(), 6), folder, identities=people)
    card = qface.model_card(qface.export(student, tmp_path / "student.onnx"))
    _, front, body = card.split("---\n", 2)
    fields = [line.partition(" #")[0] for line in front.splitlines()]
    assert fields[:4] == ["license:", "library_name: qface", "base_model:", "base_model_relation: quantized"]
    assert fields[4:] == ["tags:", "- face-recognition", "- onnx", "- quantized"]
    assert "uint8" not in body and "float32 [batch, 3, 112, 96]" in body and "color order BGR" in body
    assert "float32 [batch, 16]" in body
    assert "7 images of the folder my_faces, 2 people (people.txt)" in body
    assert str(tmp_path) not in card
    source = provenance_of(student)[0]["source_sha256"]
    assert len(source) == 64 and source in body
    assert not re.search(r"\b20\d\d-\d\d", card)


def test_a_float_networks_card_says_nothing_of_bits(tmp_path: Path) -> None:
    card = qface.model_card(qface.export(network(), tmp_path / "float.onnx"))
    assert "quantized" not in card and "Bits:" not in card and "Exported without changes after loading" in card


def test_a_card_says_where_embeddings_have_unit_length(tmp_path: Path) -> None:
    card = qface.model_card(exported(tmp_path / "unit.onnx", normalize=True))
    assert "float32 [batch, 16], of unit length." in card and "linalg.norm" not in card
    plain = qface.model_card(exported(tmp_path / "plain.onnx"))
    assert "unit length" not in plain and "linalg.norm" in plain


def test_thresholds_and_given_figures_are_listed(tmp_path: Path) -> None:
    file = exported(tmp_path / "student.onnx")
    assert "None were measured" in qface.model_card(file)
    qface.write_thresholds(file, qface.MatchThresholds({"1e-3": 0.25}, 20, 10, 190))
    card = qface.model_card(file, ["It recognizes\nsomebody."])
    assert "above a cosine of 0.2500 (FPR 1e-3)" in card and "- It recognizes somebody.\n" in card
    assert "None were measured" not in card


def test_a_card_has_the_date_that_the_environment_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = exported(tmp_path / "student.onnx")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert "on 1970-01-02." in qface.model_card(file)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match=r"SOURCE_DATE_EPOCH must be .*, got 'yesterday'"):
        qface.model_card(file)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    file = exported(tmp_path / "student.onnx")
    model = onnx.load(str(file))
    del model.metadata_props[:]
    onnx.save(model, str(file))
    with pytest.raises(CheckpointError, match="no 'preprocessing' in its metadata: export it again"):
        qface.model_card(file)


def test_the_command_export_writes_the_card_beside_the_file(tmp_path: Path) -> None:
    qface.save(network(), tmp_path / "network.safetensors")
    command = ["export", str(tmp_path / "network.safetensors"), "-o", str(tmp_path / "net.onnx")]
    card = tmp_path / "net.md"
    assert CliRunner().invoke(main, [*command, "--no-card"]).exit_code == 0
    assert not card.exists()
    result = CliRunner().invoke(main, [*command, "--normalize"])
    assert result.exit_code == 0 and str(card) in result.output
    assert "of unit length" in card.read_text(encoding="utf-8")
    assert card.read_text(encoding="utf-8") == qface.model_card(tmp_path / "net.onnx")
    card.write_text("filled in by hand", encoding="utf-8")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and f"kept {card}: delete it" in result.output
    assert card.read_text(encoding="utf-8") == "filled in by hand"
