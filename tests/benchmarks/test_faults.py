from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.scripts import FOLDER, script

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def test_commands_leave_nothing_wrong() -> None:
    commands = ("align", "export of floats", "ijb")
    only = [word for name in commands for word in ("--only", name)]
    # A process of its own, as it forks, which threads of other tests would not survive.
    done = subprocess.run(
        [sys.executable, FOLDER / "faults.py", "--rounds", "1", *only, "--json"],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["findings"] == []
    assert {row["command"] for row in report["rows"]} == set(commands)
    assert len(report["rows"]) == 15


def careless() -> None:
    """Writes its file in two halves, and a temporary one that it forgets when it is stopped."""
    forgotten = Path("tmp/forgotten")
    forgotten.touch()
    with open("out/new", "w") as file:
        file.write("one half")
        file.flush()
        time.sleep(0.4)
        file.write(", the other")
    forgotten.unlink()


def test_a_careless_command_is_found(tmp_path: Path) -> None:
    faults = script("faults")
    job = faults.Job("careless", careless, ("new",))
    cases = faults.Cases(job, faults.undisturbed(job, tmp_path), tmp_path, random.Random(0))
    for _ in range(5):
        cases.disturb("SIGTERM")
    found = "\n".join(cases.tally.findings)
    assert "new is neither absent, old nor complete" in found
    assert "leaves temporary files" in found
