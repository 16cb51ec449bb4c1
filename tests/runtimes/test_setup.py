from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runtimes import parts, setup
from tests.runtimes.runtime import HOST, Runtime, RuntimeFailedError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFACE_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_a_part_appears_whole_and_is_not_installed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PARTS, "web", lambda target: (target / "file").touch())
    assert parts.reason_missing("web") == "web is not set up: run make runtimes"
    assert setup.main(["web"]) == 0
    assert parts.reason_missing("web") is None
    monkeypatch.setitem(parts.PARTS, "web", lambda _: pytest.fail("it is there"))
    assert setup.main(["web"]) == 0
    assert [path.name for path in folder.rglob("*")] == ["web", "file"]


def test_a_part_that_cannot_be_installed_tells_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(target: Path) -> None:
        (target / "half").touch()
        raise parts.PartError("there is no npm")

    monkeypatch.setitem(parts.PARTS, "web", fail)
    assert setup.main(["web"]) == 0
    assert capsys.readouterr().out == "web: left out: there is no npm\n"
    assert [path.name for path in folder.iterdir()] == ["web.missing"]
    assert Runtime("web").reason_missing() == "web is left out: there is no npm"
    with pytest.raises(RuntimeFailedError, match="there is no npm"):
        Runtime("web").embed("student.onnx", np.zeros((1, 3, 8, 8), np.uint8))


def test_a_missing_command_and_a_failing_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(parts.PartError, match="there is no dpkg"):
        parts.install("qemu")
    node = tmp_path / "node"
    node.write_text("#!/bin/sh\necho first >&2\necho no network >&2\nexit 1\n")
    node.chmod(0o755)
    with pytest.raises(parts.PartError, match=r"^node says: no network$"):
        parts.install("web")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["docker"]) == 2
    assert capsys.readouterr().err.startswith("there is no part docker: choose from qemu, ")


def test_what_a_runtime_prints_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"broken")
    with pytest.raises(RuntimeFailedError, match=r"host: (.|\n)*broken\.onnx"):
        Runtime(HOST).embed(broken, np.zeros((1, 3, 8, 8), np.uint8))
