"""Commands that a signal stops: they leave a checkpoint, and the same command goes on to the same file."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import qface
from qface.cli import main
from qface.data import ImageFolder
from qface.distillation.checkpoint import TrainingRun
from qface.files import alone_in
from qface.quantization import output_errors
from qface.signals import ended_by_signals
from tests.crops import write_crops
from tests.networks import random_faces, tiny_face_net

NET = "tests.networks:tiny_face_net"
COMMANDS = {
    "distill": ["distill", "student.safetensors", "--teacher", NET],
    "prune": ["prune", NET, "--distill"],
}


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A job in the background of a shell ignores Ctrl-C, and its children inherit that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_crops(tmp_path / "crops", dict.fromkeys(("Ann", "Bob", "Cid"), 8))
    qface.save(qface.calibrate(qface.quantize(tiny_face_net()), random_faces(8)), tmp_path / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["qface", *arguments])
    try:
        with ended_by_signals():
            main(list(arguments), standalone_mode=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def interrupting(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process get Ctrl-C while it logs a step."""
    log = TrainingRun.log

    def interrupted(self: TrainingRun, record: dict[str, float]) -> None:
        log(self, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingRun, "log", interrupted)


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_same_command_goes_on_after_a_signal(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMANDS[verb], "--images", "crops", "--batch-size", "8", "--epochs", "2"]
    whole, stopped = ([*command, "-o", f"{name}.safetensors"] for name in ("whole", "stopped"))
    assert run(monkeypatch, *whole) == 0
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        assert run(patch, *stopped) == 130
    assert f"stopped; to continue: qface {' '.join(stopped)}\n" in capsys.readouterr().err
    assert not (folder / "stopped.safetensors").exists()
    assert list((folder / "stopped.safetensors.run").rglob("checkpoint.pt"))
    assert run(monkeypatch, *stopped) == 0
    assert "resuming at step 3 of 6" in capsys.readouterr().err
    files = [(folder / f"{name}.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    networks = [f"{name}.safetensors" for name in ("stopped", "student", "whole")]
    assert sorted(path.name for path in folder.iterdir()) == ["crops", *networks]


def test_a_calibration_goes_on_after_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qface.save(qface.quantize(tiny_face_net()), folder / "student.safetensors")
    options = ["--images", "crops", "--batch-size", "8"]
    whole, stopped = (["calibrate", "student.safetensors", *options, "-o", f"{name}.safetensors"] for name in "ab")
    assert run(monkeypatch, *whole) == 0
    observe = output_errors.OutputErrors.observe

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return observe(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output_errors.OutputErrors, "observe", interrupted)
        assert run(patch, *stopped) == 143
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        "stopping after this step; a second signal stops at once, and the step is lost",
        f"stopped; to continue: qface {' '.join(stopped)}",
    ]
    assert not (folder / "b.safetensors").exists()
    assert run(monkeypatch, *stopped) == 0
    assert "continuing the calibration in b.safetensors.run" in capsys.readouterr().err
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    assert not (folder / "b.safetensors.run").exists()


@pytest.mark.parametrize(
    ("command", "continues"),
    [
        ("evaluate NET --images crops --run-dir runs".split(), True),
        ("sensitivity NET --images crops --run-dir runs --num-images 20".split(), True),
        ("compress NET --images more --bits 6 --at-fpr 1e-1 --num-images 4 -o small.onnx".split(), True),
        ("allocate-bits NET --images crops --budget-mb 1 --num-images 20 -o bits.json".split(), True),
        ("evaluate NET --images crops".split(), False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_that_can_continue_says_so_when_it_is_stopped(
    command: list[str],
    continues: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [NET if word == "NET" else word for word in command]
    write_crops(folder / "more", {f"person_{number:02d}": 6 for number in range(12)})
    read = ImageFolder.read

    def interrupted(self: ImageFolder, indices: Sequence[int]) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return read(self, indices)

    monkeypatch.setattr(ImageFolder, "read", interrupted)
    assert run(monkeypatch, *words) == 130
    found = capsys.readouterr().err
    assert (f"stopped; to continue: qface {' '.join(words)}\n" in found) == continues


def test_a_folder_in_which_a_second_process_began_is_left_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = folder / "trained.safetensors.run"
    command = [*COMMANDS["distill"], "--images", "crops", "--max-steps", "2", "-o", "trained.safetensors"]
    save = qface.save
    with ExitStack() as second:

        def saved(*arguments: Any) -> None:
            second.enter_context(alone_in(run_dir))
            save(*arguments)

        monkeypatch.setattr(qface, "save", saved)
        assert run(monkeypatch, *command) == 0
        assert (run_dir / "checkpoint.pt").exists()
    monkeypatch.setattr(qface, "save", save)
    assert run(monkeypatch, *command) == 0
    assert not run_dir.exists()


def test_a_folder_that_was_chosen_stays_and_is_resumed_where_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--images", "crops", "--batch-size", "8", "--run-dir", "runs", "--checkpoint-every", "1"]
    command = [*COMMANDS["distill"], *options, "-o", "trained.safetensors"]
    with monkeypatch.context() as patch:
        interrupting(patch, 1)
        assert run(patch, *command) == 130
    assert capsys.readouterr().err.rstrip().endswith("-o trained.safetensors --resume")
    assert run(monkeypatch, *command) == 2
    assert "already holds a run: resume it" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--resume") == 0
    assert (folder / "runs" / "checkpoint.pt").exists()
