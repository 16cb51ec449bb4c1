"""A short run of the fuzzer finds nothing, and what it is to find it does find."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.scripts import run, script


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    result = run("fuzz", "--cases", 40, "--per-process", 40, "--seed", 11, "--keep", tmp_path / "kept", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0, record
    assert all(row["cases"] == 40 and not row["findings"] for row in record["rows"])
    assert not (tmp_path / "kept").exists()


def _die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _fail(path: Path) -> None:
    raise TypeError("no error of qface's")


def _fill(path: Path) -> None:
    bytes_of_ones = bytearray(b"\x01") * (5 * 2**28)
    assert len(bytes_of_ones) > 0


def _wait(path: Path) -> None:
    while True:
        time.monotonic()


@pytest.mark.parametrize(
    ("fault", "wanted"), [(_die, "crash"), (_fail, "traceback"), (_fill, "MB"), (_wait, "timeout")]
)
def test_a_fault_is_a_finding(
    fault: Callable[[Path], None], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = script("fuzz")
    honest = module.READERS["pairs"]

    def read(path: Path) -> None:
        if path.read_bytes() != original:
            fault(path)

    honest.write(tmp_path / "honest.txt")
    original = (tmp_path / "honest.txt").read_bytes()
    monkeypatch.setitem(
        module.READERS,
        "pairs",
        dataclasses.replace(honest, read=read, mutations=(lambda content, rng: content + b"x",)),
    )
    monkeypatch.setattr(module, "SECONDS", 5.0)
    row = module.fuzz("pairs", 1, 0, tmp_path / "kept", False)
    (finding,) = row.findings
    assert wanted in finding
    assert [each.read_bytes() for each in (tmp_path / "kept").iterdir()] == [original + b"x"]


def test_readers_that_are_not_there(tmp_path: Path) -> None:
    result = run("fuzz", "--readers", "pairs,paris")
    assert result.exit_code == 1 and "no reader 'paris'" in result.stderr


@pytest.mark.parametrize("per_process", [1, 2, 10])
def test_a_crash_and_a_hang_cost_one_case_each(per_process: int, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [int, lambda: _die(tmp_path), int, lambda: _wait(tmp_path), int, int]
    outcomes = list(script("harness.confinement").confined_calls(calls, 2.0, per_process))
    assert [each.kind for each in outcomes] == ["read", "crash", "read", "timeout", "read", "read"]
    assert "-11" in outcomes[1].message
