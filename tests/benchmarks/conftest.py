from __future__ import annotations

from pathlib import Path

import pytest

import qface
from qface.data import ImageFolder
from tests.conftest import Crops
from tests.networks import tiny_face_net


@pytest.fixture
def data(tmp_path: Path, crops: Crops) -> Path:
    """A folder like the real one: few people of noise, their pairs, and a tiny network."""
    root = tmp_path / "shared"
    (root / "weights").mkdir(parents=True)
    folder = crops({f"Person_{number:02}": 4 for number in range(48)}, folder="shared/data/lfw")
    names = ImageFolder(folder, identities="second-half").names
    lines = ["2\t3"]
    for fold in (names[:6], names[6:12]):
        lines += [f"{name}\t1\t2" for name in fold[:3]]
        lines += [f"{one}\t1\t{other}\t2" for one, other in zip(fold[:3], fold[3:], strict=True)]
    (root / "data" / "lfw_pairs.txt").write_text("\n".join(lines) + "\n")
    qface.save(tiny_face_net(size=(112, 112)), root / "weights" / "mobilefacenet_112x96.safetensors")
    return root
