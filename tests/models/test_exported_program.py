"""Networks that ``torch.export.save`` wrote: they become layers, and nothing in their files is run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qface
from qface.errors import CheckpointError, QFaceError
from qface.graph.queries import is_layer_graph
from qface.models import MobileFaceNet
from qface.preprocessing import Preprocessing, preprocessing_of
from tests.networks import foreign_net, random_faces, tiny_face_net, with_statistics

Change = Callable[[dict[str, Any]], None]


def exported(path: Path, model: nn.Module, size: tuple[int, int] = (112, 112), dynamic: bool = True) -> Path:
    images = torch.zeros(2 if dynamic else 1, 3, *size)
    shapes = ({0: Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(model.eval(), (images,), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize(
    ("make", "dynamic"),
    [
        (tiny_face_net, True),
        (tiny_face_net, False),
        (lambda: with_statistics(MobileFaceNet(8, (112, 96))).eval(), True),
    ],
)
def test_a_network_of_layers(make: Callable[[], nn.Module], dynamic: bool, tmp_path: Path) -> None:
    model = make()
    size = (112, 96) if isinstance(model, MobileFaceNet) else (112, 112)
    loaded = qface.load(exported(tmp_path / "m.pt2", model, size, dynamic))
    assert is_layer_graph(loaded) and not loaded.training
    assert preprocessing_of(loaded).size == size
    images = preprocessing_of(loaded)(random_faces(3))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    assert set(loaded.state_dict()) <= set(model.state_dict())
    student = qface.calibrate(qface.quantize(loaded), random_faces(4))
    qface.save(student, tmp_path / "s.safetensors")


def test_preprocessing_is_the_default_unless_given(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2", tiny_face_net())
    assert preprocessing_of(qface.load(path)) == Preprocessing()
    other = Preprocessing(color="BGR")
    assert preprocessing_of(qface.load(path, preprocessing=other)) == other


def test_its_name_does_not_matter_and_it_brings_its_network(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2", tiny_face_net()).rename(tmp_path / "m.pth")
    assert is_layer_graph(qface.load(path))
    with pytest.raises(CheckpointError, match="omit model="):
        qface.load(path, model=tiny_face_net())


def test_a_fixed_number_of_images_that_cannot_be_undone_is_said(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2", foreign_net(), dynamic=False)  # views of [1, -1]
    with pytest.raises(QFaceError, match="dynamic"):
        qface.load(path)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).mean((2, 3))


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 112, 112)
    torch.export.save(torch.export.export(TwoInputs(), (images, images)), tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match="has 2 inputs"):
        qface.load(tmp_path / "m.pt2")


def rewritten(source: Path, part: str, change: Change) -> Path:
    """The archive again, with what ``change`` makes of the JSON of one part."""
    target = source.with_name("changed.pt2")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if part in name and name.endswith(".json"):
                record = json.loads(content)
                change(record)
                content = json.dumps(record).encode()
            new.writestr(name, content)
    return target


def nodes(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record["graph_module"]["graph"]["nodes"]


def write_file(path: str) -> dict[str, Any]:
    arguments = [
        {"name": "filename", "arg": {"as_string": path}, "kind": 1},
        {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
        {"name": "size", "arg": {"as_int": 4}, "kind": 1},
    ]
    return {"target": "torch.ops.aten.from_file.default", "inputs": arguments}


def harmful(marker: str) -> dict[str, tuple[str, Change]]:
    code = f"__import__('os').mkdir('{marker}')"

    def expression(record: dict[str, Any]) -> None:
        for value in record["graph_module"]["graph"]["tensor_values"].values():
            value["sizes"][:1] = [{"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}]

    def placeholder(record: dict[str, Any]) -> None:
        changed = json.loads(json.dumps(record).replace('"name": "x"', json.dumps({"name": f"x={code}"})[1:-1]))
        record.clear()
        record.update(changed)

    def context(record: dict[str, Any]) -> None:
        spec = {"type": "builtins.dict", "context": '{"__enum__": true, "fqn": "antigravity:x"}', "children_spec": []}
        record["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    def pickled(record: dict[str, Any]) -> None:
        next(iter(record["config"].values()))["use_pickle"] = True

    return {
        "expression": ("models/", expression),
        "name": ("models/", placeholder),
        "function": ("models/", lambda record: nodes(record)[0].update(target="torch.os.getcwd")),
        "file": ("models/", lambda record: nodes(record)[0].update(write_file(marker))),
        "context": ("models/", context),
        "weights": ("weights_config", pickled),
    }


@pytest.mark.parametrize("kind", list(harmful("")))
def test_what_could_be_code_is_refused(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    part, change = harmful(str(marker))[kind]
    path = rewritten(exported(tmp_path / "m.pt2", tiny_face_net()), part, change)
    with pytest.raises(CheckpointError, match="does not run code from files"):
        qface.load(path)
    assert not marker.exists()


def test_guards_and_example_inputs_are_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    guard = f"__import__('os').mkdir('{marker}')"
    path = rewritten(
        exported(tmp_path / "m.pt2", tiny_face_net()), "models/", lambda record: record.update(guards_code=[guard])
    )
    assert is_layer_graph(qface.load(path))
    assert not marker.exists()


def test_damage_is_one_line(tmp_path: Path) -> None:
    whole = exported(tmp_path / "m.pt2", tiny_face_net())
    for part, change in (
        ("models/", lambda record: record.pop("graph_module")),
        ("weights_config", lambda record: next(iter(record["config"].values()))["tensor_meta"].update(sizes=[])),
        ("weights_config", lambda record: record["config"].popitem()),
    ):
        with pytest.raises(CheckpointError) as caught:
            qface.load(rewritten(whole, part, change))
        assert "\n" not in str(caught.value)
