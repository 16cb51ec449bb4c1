"""All verbs that take a network: in which forms, and whether they change it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qface
from qface.errors import CheckpointError, ConfigError
from tests.crops import write_crops
from tests.data.ijb import SmallIjb
from tests.networks import random_faces, tiny_face_net

PEOPLE = tuple(f"{name}_{number}" for name in ("Ann", "Bob", "Cid", "Dee") for number in range(3))
FACES = random_faces(4)
ONE_STEP = qface.SynthesisConfig(num_images=2, num_steps=1, batch_size=2)
LAYERS_ONLY = {"inspect.model", "measure_size.model_or_file"}
NO_PATHS = {"load.model", "save.model", "with_preprocessing.model"}


def training() -> qface.DistillConfig:
    return qface.DistillConfig(max_steps=1, device="cpu")


def compress(model: Any) -> qface.Compression:
    target, config = (
        qface.CompressionTarget(max_mb=0.1, at_fpr="1e-1"),
        qface.CompressConfig(distill="never", calibration=qface.CalibrationConfig(num_images=4)),
    )
    return qface.compress(model, "faces", "small.onnx", target, config)


VERBS: dict[str, Callable[[Any], Any]] = {
    "allocate_bits.model": lambda model: qface.allocate_bits(model, FACES, 0.05),
    "calibrate.student": lambda model: qface.calibrate(model, FACES),
    "compress.model": compress,
    "distill.student": lambda model: qface.distill(model, "teacher.safetensors", FACES, training()),
    "distill.teacher": lambda model: qface.distill("student.safetensors", model, FACES, training()),
    "evaluate.gallery": lambda model: qface.evaluate("teacher.onnx", "faces", gallery=model),
    "evaluate.model": lambda model: qface.evaluate(model, "faces"),
    "evaluate_groups.model": lambda model: qface.evaluate_groups(model, "faces", "groups.csv", at_fpr="1e-2"),
    "evaluate_groups.reference": lambda model: qface.evaluate_groups(
        "teacher.onnx", "faces", "groups.csv", model, at_fpr="1e-2"
    ),
    "evaluate_identification.model": lambda model: qface.evaluate_identification(model, "faces"),
    "evaluate_stress.model": lambda model: qface.evaluate_stress(model, "faces", conditions=["dark"]),
    "evaluate_stress.reference": lambda model: qface.evaluate_stress(
        "teacher.onnx", "faces", reference=model, conditions=["dark"]
    ),
    "evaluate_templates.model": lambda model: qface.evaluate_templates(model, "IJBC"),
    "export.model": lambda model: qface.export(model, "exported.onnx"),
    "inspect.model": qface.inspect,
    "load.model": lambda model: qface.load("teacher.safetensors", model=model),
    "match_thresholds.model": lambda model: qface.match_thresholds(model, "faces", ["1e-1"]),
    "measure_size.model_or_file": qface.measure_size,
    "operating_thresholds.student": lambda model: qface.operating_thresholds(model, "teacher.onnx", "faces", "1e-2"),
    "operating_thresholds.teacher": lambda model: qface.operating_thresholds("student.onnx", model, "faces", "1e-2"),
    "prune.model": lambda model: qface.prune(model, 0.3),
    "quantize.model": qface.quantize,
    "save.model": lambda model: qface.save(model, "saved.safetensors"),
    "sensitivity.model": lambda model: qface.sensitivity(model, FACES, weight_bits=[4], activation_bits=[]),
    "synthesize.model": lambda model: qface.synthesize(model, "made", ONE_STEP),
    "verify.student": lambda model: qface.verify(model, "student.onnx", FACES),
    "with_preprocessing.model": lambda model: qface.with_preprocessing(model, qface.Preprocessing()),
}
"""A call of each verb with the network in question, by verb and argument."""

OF_STUDENTS = {"calibrate.student", "distill.student", "verify.student"}
CHANGING = {"calibrate.student", "distill.student"}

FILES: dict[str, Callable[[Any], Any]] = {
    "load": qface.load,
    "load_bits": qface.load_bits,
    "model_card": qface.model_card,
    "plot": lambda file: qface.plot("training", file, "training.svg"),
    "report": lambda file: qface.report(file, "report.html"),
    "selftest": qface.selftest,
    "thresholds_of": qface.thresholds_of,
    "verify": lambda file: qface.verify("student.safetensors", file, FACES),
    "write_tensorboard": lambda file: qface.write_tensorboard(file, "events"),
    "write_thresholds": lambda file: qface.write_thresholds(file, qface.MatchThresholds({}, 1, 1, 1)),
}
"""A call of each verb that takes a file in no other form."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and its student as files, faces of twelve people in two groups, and a small IJB-C."""
    folder = tmp_path_factory.mktemp("verbs")
    write_crops(folder / "faces", dict.fromkeys(PEOPLE, 6))
    (folder / "groups.csv").write_text("".join(f"{name},{'AB'[at % 2]}\n" for at, name in enumerate(PEOPLE)))
    SmallIjb(folder / "IJBC")
    teacher = tiny_face_net()
    student = qface.calibrate(qface.quantize(teacher), FACES)
    for name, network in {"teacher": teacher, "student": student}.items():
        qface.save(network, folder / f"{name}.safetensors")
        qface.export(network, folder / f"{name}.onnx")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in that folder."""
    monkeypatch.chdir(folder)


def networks_taken(verb: Callable[..., Any]) -> list[str]:
    """Names of the arguments that take a network, by the names of such types in the signature."""
    types = re.compile(r"\b(NetworkLike|Model|nn\.Module|fx\.GraphModule|ModuleT)\b")
    return [each.name for each in inspect.signature(verb).parameters.values() if types.search(each.annotation)]


def test_the_table_of_this_file_names_every_verb() -> None:
    verbs = {name: getattr(qface, name) for name in qface.__all__ if inspect.isfunction(getattr(qface, name))}
    assert set(VERBS) == {f"{name}.{argument}" for name, verb in verbs.items() for argument in networks_taken(verb)}


@pytest.mark.parametrize("wrong", [None, 3, ["teacher.onnx"], nn.ReLU], ids=repr)
@pytest.mark.parametrize("name", [*VERBS, *FILES])
def test_another_type_is_refused_in_one_line(name: str, wrong: Any) -> None:
    if wrong is None and name in (
        "evaluate.gallery",
        "evaluate_groups.reference",
        "evaluate_stress.reference",
        "load.model",
    ):
        pytest.skip("None leaves it out")
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module|path") as caught:
        (VERBS | FILES)[name](wrong)
    assert type(wrong).__name__ in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", sorted(set(VERBS) - LAYERS_ONLY - NO_PATHS))
def test_a_name_without_weights_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"^mobilefacenet is the name of an architecture and has no weights"):
        VERBS[name]("mobilefacenet")


@pytest.mark.parametrize("name", sorted(LAYERS_ONLY))
def test_verbs_that_look_at_layers_take_a_name(name: str) -> None:
    assert "conv" in str(VERBS[name]("mobilefacenet").to_dict())


@pytest.mark.parametrize("name", sorted(set(VERBS) - NO_PATHS))
def test_a_path_serves_as_well_as_its_network(name: str) -> None:
    """Whatever the verb makes of a network, it makes of its file; the file never changes, the network where it says."""
    file = "student.safetensors" if name in OF_STUDENTS else "teacher.safetensors"
    network, written = qface.load(file), Path(file).read_bytes()
    before = plain(network)
    assert plain(VERBS[name](network)) == plain(VERBS[name](file))
    assert Path(file).read_bytes() == written
    assert (plain(network) == before) == (name not in CHANGING)


def plain(result: Any) -> Any:
    """``result`` as values that compare, without the time that it took."""
    if isinstance(result, nn.Module):
        return {name: tensor.tolist() for name, tensor in result.state_dict().items()}
    record = result.to_dict() if hasattr(result, "to_dict") else {"result": result}
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_of_a_path_the_changed_network_is_returned(name: str) -> None:
    changed = VERBS[name]("student.safetensors")
    assert plain(changed) != plain(qface.load("student.safetensors"))


@pytest.mark.parametrize("name", VERBS)
def test_the_docstring_says_whether_the_network_changes(name: str) -> None:
    verb, _, argument = name.partition(".")
    text = " ".join((getattr(qface, verb).__doc__ or "").split())
    changes = name in CHANGING or (argument == "model" and verb in ("load", "with_preprocessing"))
    assert re.search(rf"{'Changes' if changes else 'Does not change'} [^.]*``{argument}``", text)
    if name in CHANGING:
        assert "of a path it loads, changes and returns the network, and the file stays as it is" in text
