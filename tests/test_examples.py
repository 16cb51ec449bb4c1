from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import qface
from qface.data import ImageFolder
from tests.conftest import Crops
from tests.networks import tiny_face_net

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_network_is_quantized_on_few_people(
    tmp_path: Path, crops: Crops, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = crops({f"Person_{number}": 4 for number in range(12)})
    names = ImageFolder(faces, identities="second-half").names
    lines = ["2\t1"]
    for one, other in (names[:2], names[2:4]):
        lines += [f"{one}\t1\t2", f"{one}\t1\t{other}\t2"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    qface.save(tiny_face_net(), tmp_path / "network.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qface.distillation.batches.MIN_STEPS", 4)
    monkeypatch.setattr(sys, "argv", ["example", "network.safetensors", str(faces), "pairs.txt"])
    runpy.run_path(str(EXAMPLES / "quantize_a_network.py"))
    assert capsys.readouterr().out.count("'1e-4': None") == 2
