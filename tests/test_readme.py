"""README's commands and Python run in their order as they are printed, but for figures that need many faces."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import qface
from qface.cli import main
from tests.crops import write_crops
from tests.data.ijb import SmallIjb
from tests.networks import tiny_face_net

README = Path(qface.__file__).parents[1] / "README.md"

FEW_FACES = {
    "compress": ("--max-drop", "60", "--at-fpr", "1e-1", "--distill", "never"),
    "report": ("--fpr", "1e-1", "--latency-runs", "1"),
    "sensitivity": ("--num-images", "4"),
    "allocate-bits": ("--num-images", "4"),
    "distill": ("--max-steps", "2"),
    "pairs": ("--folds", "2", "--pairs-per-fold", "8"),
    "thresholds": ("--fpr", "1e-1"),
    "bench": ("--runs", "1"),
    "align": ("--landmarks", "landmarks.txt"),
}
"""Options added for twenty people who are noise; the detector of ``align`` has a test of its own."""


def commands() -> list[str]:
    section = README.read_text(encoding="utf-8").split("## Command line")[1].split("\n## ")[0]
    return re.findall(r"^    (qface .*?)(?:\s+# .*)?$", section, re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos that are aligned already, with their landmarks, a set of templates, and a network."""
    monkeypatch.chdir(tmp_path)
    people = [f"Person_{number:02}" for number in range(20)]
    write_crops(Path("photos"), dict.fromkeys(people, 3))
    points = "38.3 51.7 73.5 51.5 56 71.7 41.5 92.4 70.7 92.2"
    photos = sorted(Path("photos").rglob("*.png"))
    Path("landmarks.txt").write_text("".join(f"{photo.relative_to('photos')} {points}\n" for photo in photos))
    SmallIjb(Path("IJBC"))
    qface.save(tiny_face_net(), "mobilefacenet.safetensors")
    return tmp_path


def test_the_commands_run_in_their_order(workplace: Path) -> None:
    printed = commands()
    assert len(printed) >= 20
    for command in printed:
        name, *arguments = shlex.split(command)[1:]
        result = CliRunner().invoke(main, [name, *arguments, *FEW_FACES.get(name, ())])
        assert result.exit_code == 0, f"{command}\n{result.output}"


def test_the_python_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_crops(Path("faces"), {f"Person_{number:02}": 3 for number in range(20)})
    qface.make_pairs("faces", "pairs.txt", "second-half", folds=2, pairs_per_fold=8)
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    exec(code[1], {})
    agrees, title, *_ = capsys.readouterr().out.splitlines()
    assert agrees == "True" and "30 images of 10 people" in title
