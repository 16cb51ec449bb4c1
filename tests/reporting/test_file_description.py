"""``describe``, and ``qface inspect``: what a file is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.deployment.metadata import add_metadata, read_metadata
from qface.errors import CheckpointError
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.pruning.budget import count_parameters
from qface.quantization import LayerBits, QuantizationConfig
from qface.reporting.file_description import FileDescription, describe
from tests.networks import random_faces, tiny_face_net

READS = Preprocessing(size=(112, 96), crop=(0, 8, 112, 104), color="BGR", std=(128.0,) * 3, source="file")
MIXED = QuantizationConfig(6, 6, overrides={"conv": LayerBits(weight=8)})
Make = Callable[[Path], Path]


def network() -> torch.nn.Module:
    return with_preprocessing(tiny_face_net(size=READS.size), READS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float network, its student, and files of both."""
    folder = tmp_path_factory.mktemp("files")
    student = qface.calibrate(qface.quantize(network(), MIXED), random_faces())
    qface.save(network(), folder / "float.safetensors")
    qface.save(student, folder / "student.safetensors")
    qface.save(qface.quantize(network(), MIXED), folder / "uncalibrated.safetensors")
    qface.export(network(), folder / "float.onnx")
    qface.export(student, folder / "student.onnx")
    qface.export(student, folder / "bytes.onnx", input="uint8", weight_format="int8")
    qface.export(student, folder / "browser.onnx", target="float32")
    for name in ("float", "student"):
        without_metadata(folder / f"{name}.onnx", folder / f"foreign_{name}.onnx")
    return folder


def without_metadata(file: Path, output: Path) -> None:
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, output)


KINDS = {
    "float.safetensors": "float network",
    "student.safetensors": "student",
    "uncalibrated.safetensors": "student",
    "float.onnx": "exported float network",
    "student.onnx": "exported student",
    "bytes.onnx": "exported student",
    "browser.onnx": "exported student",
    "foreign_float.onnx": "ONNX file",
    "foreign_student.onnx": "ONNX file",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_file_says_what_it_is(folder: Path, name: str) -> None:
    found = describe(folder / name)
    assert found.kind == KINDS[name]
    assert found.dimensions == 16
    assert found.bytes == (folder / name).stat().st_size
    assert found.input == ("uint8" if name == "bytes.onnx" else "float32")
    assert found.preprocessing.size == READS.size
    if not name.startswith("foreign"):
        assert found.preprocessing == READS
    assert sum(found.weight_bits.values()) == 6


def test_a_student_and_its_files_tell_the_same(folder: Path) -> None:
    student = describe(folder / "student.safetensors")
    assert dict(student.weight_bits) == {6: 5, 8: 1}
    assert student.activation_bits and set(student.activation_bits) == {6, 8}
    assert student.steps[0] == "Quantized to 6-bit weights and 6-bit activations, 1 layers have bits of their own."
    for name in ("student.onnx", "bytes.onnx", "browser.onnx"):
        file = describe(folder / name)
        assert (file.steps, file.weight_bits, file.parameters) == (
            student.steps,
            student.weight_bits,
            student.parameters,
        )
        assert file.activation_bits == ({} if name == "browser.onnx" else student.activation_bits)
        assert file.plan is None


def test_a_float_network_has_a_plan_in_every_form(folder: Path) -> None:
    plans = [describe(folder / name, 4).plan for name in ("float.safetensors", "float.onnx", "foreign_float.onnx")]
    for plan in plans:
        assert plan is not None
        assert {layer.weight_bits for layer in plan.layers} == {4, None}
    assert describe(folder / "float.safetensors").parameters == count_parameters(network())
    assert describe("mobilefacenet").bytes is None


def test_a_file_without_a_plan_says_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = describe(folder / "foreign_student.onnx")
    assert (found.plan, found.activation_bits) == (None, None)
    assert "is quantized already" in caplog.text


def test_what_the_user_says_is_read_takes_the_place_of_what_is_found(folder: Path) -> None:
    for name in ("float.safetensors", "student.onnx", "foreign_float.onnx"):
        found = describe(folder / name, preprocessing={"color": "RGB"})
        assert (found.kind, found.preprocessing.color) == (KINDS[name], "RGB")


def test_thresholds_are_shown_and_damage_is_told(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.onnx"
    file.write_bytes((folder / "student.onnx").read_bytes())
    record = {"by_fpr": {"1e-4": 0.25}, "images": 10, "identities": 5, "impostor_pairs": 40, "people": None}
    add_metadata(file, {"thresholds": json.dumps(record)})
    found = describe(file)
    assert found.thresholds is not None and found.thresholds.by_fpr == {"1e-4": 0.25}
    add_metadata(file, {"activation_bits": "[6]"})
    with pytest.raises(CheckpointError, match="activation_bits"):
        describe(file)


def test_an_older_file_does_not_know_its_activations(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "student.onnx")
    kept = {key: value for key, value in read_metadata(folder / "student.onnx").items() if key != "activation_bits"}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, tmp_path / "older.onnx")
    assert describe(tmp_path / "older.onnx").activation_bits is None


@pytest.mark.parametrize("name", ["student.safetensors", "student.onnx", "foreign_float.onnx"])
def test_the_command_prints_a_table_or_json(folder: Path, name: str) -> None:
    table = CliRunner().invoke(main, ["inspect", str(folder / name)])
    assert table.exit_code == 0, table.output
    found: FileDescription = describe(folder / name)
    assert found.kind in table.stdout and f"{found.bytes:,} bytes" in table.stdout
    assert ("multiply-adds" in table.stdout) == (found.plan is not None)
    printed = CliRunner().invoke(main, ["inspect", str(folder / name), "--json"])
    assert json.loads(printed.stdout) == {"schema_version": 1, **json.loads(json.dumps(found.to_dict()))}
