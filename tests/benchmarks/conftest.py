from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qface
from qface.data import ImageFolder
from tests.crops import write_crops
from tests.networks import tiny_face_net


@pytest.fixture(scope="session")
def data_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the real one: few people of noise, their pairs, and a tiny network. Tests only copy it."""
    root = tmp_path_factory.mktemp("data")
    (root / "weights").mkdir()
    folder = write_crops(root / "data" / "lfw", {f"Person_{number:02}": 4 for number in range(48)})
    names = ImageFolder(folder, identities="second-half").names
    lines = ["2\t3"]
    for fold in (names[:6], names[6:12]):
        lines += [f"{name}\t1\t2" for name in fold[:3]]
        lines += [f"{one}\t1\t{other}\t2" for one, other in zip(fold[:3], fold[3:], strict=True)]
    (root / "data" / "lfw_pairs.txt").write_text("\n".join(lines) + "\n")
    qface.save(tiny_face_net(size=(112, 112)), root / "weights" / "mobilefacenet_112x96.safetensors")
    return root


@pytest.fixture
def data(data_once: Path, tmp_path: Path) -> Path:
    """A copy of :func:`data_once` that a test may change."""
    return Path(shutil.copytree(data_once, tmp_path / "shared"))
