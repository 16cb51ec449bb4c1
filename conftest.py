"""The examples of docstrings run as they are printed, in a folder of tiny files with the names that they use."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from _pytest.doctest import DoctestItem

PEOPLE = tuple(f"{name}_{number}" for name in ("Ann", "Bob", "Cid", "Dee") for number in range(3))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave helpers of tests alone, which have no examples, and some of which run on other machines."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if helper and collection_path.is_relative_to(Path(__file__).parent / "tests") else None


@pytest.fixture(scope="session")
def files_of_examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``faces/`` of 12 people in two groups, what alignment and IJB need, and a network in all its forms."""
    import qface
    from tests.crops import write_crops
    from tests.data.ijb import SmallIjb
    from tests.networks import tiny_face_net

    folder = tmp_path_factory.mktemp("examples")
    write_crops(folder / "faces", dict.fromkeys(PEOPLE, 6))
    groups = (f"{name},{'AB'[number % 2]}\n" for number, name in enumerate(PEOPLE))
    (folder / "groups.csv").write_text("".join(groups))
    write_crops(folder / "photos", {"Ann": 1})
    (folder / "landmarks.txt").write_text("Ann/Ann_0001.png 38 52 74 52 56 72 42 92 71 92\n")
    SmallIjb(folder / "IJBC")
    teacher = tiny_face_net()
    student = qface.calibrate(qface.quantize(teacher, bits=6), folder / "faces")
    for name, network in {"teacher": teacher, "student": student}.items():
        qface.save(network, folder / f"{name}.safetensors")
        qface.export(network, folder / f"{name}.onnx")
    return folder


@pytest.fixture(autouse=True)
def example(request: pytest.FixtureRequest) -> None:
    """Give each example ``qface`` and, if it names them, a copy of the files and the networks of both."""
    if not isinstance(request.node, DoctestItem):
        return
    import qface

    names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
    names["qface"] = qface
    words = set(re.findall(r"\w+", "".join(line.source for line in request.node.dtest.examples)))
    folder: Path = request.getfixturevalue("tmp_path")
    if words & {"teacher", "student", "faces", "photos", "landmarks", "groups", "IJBC"}:
        folder = shutil.copytree(request.getfixturevalue("files_of_examples"), folder / "files")
    request.getfixturevalue("monkeypatch").chdir(folder)
    for name in words & {"teacher", "student"}:
        names[name] = qface.load(folder / f"{name}.safetensors")
