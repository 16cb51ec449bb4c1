"""A teacher, a student of 4 bits and its file, with the record that ``report`` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import qface
from tests.deployment.networks import calibrated
from tests.networks import tiny_face_net


def write_record(folder: Path, crops: Callable[..., Path]) -> qface.RunRecord:
    """Write the files into ``folder``, and faces of six people."""
    faces = crops(dict.fromkeys(("Ann", "Bob", "Cid", "Dee", "Eve", "Fay"), 4))
    network = tiny_face_net()
    student = calibrated(network, 4)
    paths = [folder / name for name in ("teacher.safetensors", "student.safetensors", "student.onnx")]
    qface.save(network, paths[0])
    qface.save(student, paths[1])
    qface.export(student, paths[2])
    return qface.RunRecord(*map(str, paths), images=str(faces))
