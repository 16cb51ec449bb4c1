"""Zip archives: a directory with too many entries is refused before zipfile reads it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qface
from qface.archives import names_in, opened
from qface.errors import LimitError
from qface.models.exported_program import load_exported_program
from qface.pickles.torch_files import read_torch_file


def archive(path: Path, entries: int, size: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as written:
        for number in range(entries):
            written.writestr(f"archive/{number}", bytes(size))
    return path


@pytest.mark.parametrize("size", [0, 2**18 - 50])  # entries across the blocks that are read
def test_names_and_content_are_those_of_the_archive(size: int, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", 9, size)
    assert names_in(path) == [f"archive/{number}" for number in range(9)]
    with opened(path) as found:
        assert found.testzip() is None


@pytest.mark.parametrize("reader", [names_in, read_torch_file, load_exported_program, qface.load])
def test_too_many_entries_are_refused(
    reader: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "a.pt", 400)
    monkeypatch.setenv("QFACE_LIMITS", f"bytes={400 * 1024 - 1}")
    with pytest.raises(LimitError, match=r"a\.pt needs 4\.096e\+05 bytes.*QFACE_LIMITS"):
        reader(path)


def test_a_run_with_too_many_entries_in_its_checkpoint_is_refused(
    tmp_path: Path, crops: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112**2, 4)) for _ in range(2))
    config = qface.DistillConfig(max_steps=1, batch_size=2, device="cpu")
    faces = crops({"anna": 3})
    qface.distill(student, teacher, faces, config, tmp_path / "run")
    archive(tmp_path / "run" / "checkpoint.pt", 400)
    monkeypatch.setenv("QFACE_LIMITS", f"bytes={400 * 1024 - 1}")
    with pytest.raises(LimitError, match=r"checkpoint\.pt needs"):
        qface.distill(student, teacher, faces, config, tmp_path / "run", resume=True)


def test_what_is_no_archive_has_no_names(tmp_path: Path) -> None:
    for content in (b"", b"PK", b"PK\x01\x02" * 9):
        (tmp_path / "a").write_bytes(content)
        assert names_in(tmp_path / "a") == []
    assert names_in(tmp_path / "missing") == []
