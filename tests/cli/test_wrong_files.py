"""Files of the wrong kind: the error says in one line what to do, and what it says works."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

import qface
from tests.crops import write_crops
from tests.networks import random_faces, tiny_face_net


def run(line: str) -> Result:
    from qface.cli import main

    return CliRunner().invoke(main, shlex.split(line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    student = qface.calibrate(qface.quantize(tiny_face_net(), 6), random_faces())
    qface.save(tiny_face_net(), folder / "float.safetensors")
    qface.save(student, folder / "student.safetensors")
    qface.export(student, folder / "student.onnx")
    foreign = onnx.load(qface.export(tiny_face_net(), folder / "foreign.onnx"))
    del foreign.metadata_props[:]
    onnx.save(foreign, folder / "foreign.onnx")
    write_crops(folder / "faces", {"Ann": 4, "Bob": 4})
    (folder / "people.txt").write_text("Ann\nBob\n")
    return folder


WRONG = (
    ("bench student.safetensors", "one that qface export writes", "bench student.onnx --runs 1"),
    ("selftest student.safetensors", "one that qface export writes", "selftest student.onnx"),
    (
        "thresholds student.onnx --teacher float.safetensors --images faces --fpr 0.2 --write student.safetensors",
        "one that qface export writes",
        "thresholds student.onnx --teacher float.safetensors --images faces --fpr 0.2",
    ),
    ("selftest foreign.onnx", "export it again", "export foreign.onnx --no-card -o ours.onnx"),
    ("size student.safetensors --bits 4", "leave out --bits", "size student.safetensors"),
    ("inspect student.safetensors --bits 4", "leave out --bits", "inspect student.safetensors"),
    ("inspect student.onnx --bits 4", "leave out --bits", "inspect student.onnx"),
    (
        "verify float.safetensors student.onnx --images faces",
        "give a student",
        "verify student.safetensors student.onnx --images faces",
    ),
    (
        "verify student.onnx student.onnx --images faces",
        "give the float model that it was made from",
        "verify student.safetensors student.onnx --images faces",
    ),
    ("evaluate faces --images faces", "is a folder", "evaluate student.onnx --images faces"),
    (
        "evaluate student.onnx --images faces --people student.onnx",
        "pass a text file in UTF-8",
        "evaluate student.onnx --images faces --people people.txt",
    ),
    (
        "evaluate student.onnx --images faces --people missing.txt",
        "a text file with one name per line",
        "evaluate student.onnx --images faces --people people.txt",
    ),
    ("report float.safetensors -o page.html", "pass the run folder of qface compress", None),
    ("report faces -o page.html", "pass the run folder of qface compress", None),
    (
        "sensitivity student.safetensors --images faces",
        "pass the float network",
        "sensitivity float.safetensors --images faces --num-images 2",
    ),
)


@pytest.mark.parametrize(("line", "advice", "right"), WRONG, ids=[line for line, *_ in WRONG])
def test_the_advice_of_an_error_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, advice: str, right: str | None
) -> None:
    monkeypatch.chdir(folder)
    refused = run(line)
    assert refused.exit_code == 2, refused.output
    (said,) = [each for each in refused.stderr.splitlines() if each.startswith("Error: ")]
    assert advice in said
    if right is not None:
        followed = run(right)
        assert followed.exit_code == 0, followed.output


def test_a_student_is_known_in_a_process_that_imported_nothing_else(folder: Path) -> None:
    command = [sys.executable, "-m", "qface", "export", str(folder / "student.safetensors"), "--no-card", "-o"]
    done = subprocess.run([*command, str(folder / "alone.onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
