"""Files depend on the model alone: not on the process, its random numbers, its folder or the time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import qface
from tests.networks import tiny_face_net

ROOT = Path(__file__).parents[1]


def written(folder: Path, seed: str) -> dict[str, str]:
    """The digest of each file that the worker wrote into ``folder``, by its name."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.same_bytes_worker"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    one = written(tmp_path / "one", "1")
    assert len(one) == 19
    assert one == written(tmp_path / "another folder", "2222")


def test_one_process_writes_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for file in files:
        qface.save(tiny_face_net(), file)
    assert len({file.read_bytes() for file in files}) == 1
