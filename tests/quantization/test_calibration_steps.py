"""A calibration that a signal stops: it ends with the bytes of one that nothing stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from qface.errors import CheckpointError, ConfigError
from qface.files import alone_in
from qface.graph import capture
from qface.progress import Advance, displayed
from qface.quantization import CalibrationConfig, QuantizationConfig, calibrate, quantize
from qface.signals import ended_by_signals
from tests.networks import RANGES_ONLY, random_faces, tiny_face_net

FACES = random_faces(24)
IN_EIGHTS = CalibrationConfig(len(FACES), batch_size=8)


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """A job in the background of a shell ignores Ctrl-C, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """A display of progress that raises Ctrl-C at one item of one stage, and counts the items of all."""

    def __init__(self, stage: str = "", item: int = 0) -> None:
        self.stage_name, self.item = stage, item
        self.seen: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str, total: int | None, done: int) -> Iterator[Advance]:
        def advance(note: str = "") -> None:
            self.seen[name] = self.seen.get(name, 0) + 1
            if (name, self.seen[name]) == (self.stage_name, self.item):
                signal.raise_signal(signal.SIGINT)

        yield advance


def student(observer: str = "mse") -> fx.GraphModule:
    return quantize(captured(), QuantizationConfig(4, 4, weight_observer=observer, activation_observer=observer))


@cache
def captured() -> fx.GraphModule:
    return capture(tiny_face_net())


def values(model: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def stopped(folder: Path, stage: str, item: int, observer: str = "mse") -> Interrupting:
    display = Interrupting(stage, item)
    with pytest.raises(SystemExit) as ended, displayed(display), ended_by_signals():
        calibrate(student(observer), FACES, IN_EIGHTS, run_dir=folder)
    assert ended.value.code == 130
    return display


@pytest.mark.parametrize("observer", ["mse", "minmax"])
@pytest.mark.parametrize(
    ("stage", "item"),
    [
        ("equalize", 2),
        ("observe", 2),
        ("observe", 3),
        ("choose ranges", 4),
        ("round weights", 1),
        ("round weights", 3),
    ],
)
def test_it_goes_on_where_a_signal_stopped_it(stage: str, item: int, observer: str, tmp_path: Path) -> None:
    whole = values(calibrate(student(observer), FACES, IN_EIGHTS))
    before = stopped(tmp_path, stage, item, observer)
    rest = Interrupting()
    with displayed(rest):
        found = values(calibrate(student(observer), FACES, IN_EIGHTS, run_dir=tmp_path))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    if stage != "equalize":  # a step of its own, which starts over
        assert "equalize" not in rest.seen
        assert before.seen["observe"] + rest.seen.get("observe", 0) == 3


def test_a_finished_calibration_is_not_made_again(tmp_path: Path) -> None:
    first = values(calibrate(student(), FACES, IN_EIGHTS, run_dir=tmp_path))
    display = Interrupting()
    with displayed(display):
        again = calibrate(student(), FACES, IN_EIGHTS, run_dir=tmp_path)
    assert display.seen == {}
    assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())
    assert all(quantizer.quantizing for quantizer in again.modules() if hasattr(quantizer, "quantizing"))


def test_a_second_calibration_goes_on_too(tmp_path: Path) -> None:
    """A student that has ranges gets new ones, and keeps its weights."""
    old = calibrate(student(), random_faces(8, seed=1), RANGES_ONLY)
    whole = values(calibrate(copied(old), FACES, IN_EIGHTS))
    display = Interrupting("observe", 1)
    with pytest.raises(SystemExit), displayed(display), ended_by_signals():
        calibrate(copied(old), FACES, IN_EIGHTS, run_dir=tmp_path)
    found = values(calibrate(copied(old), FACES, IN_EIGHTS, run_dir=tmp_path))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def copied(model: fx.GraphModule) -> fx.GraphModule:
    new = student()
    new.load_state_dict(model.state_dict())
    return new


def test_a_folder_without_a_state_is_taken_over(tmp_path: Path) -> None:
    stopped(tmp_path, "equalize", 1)  # before there is a state
    whole = values(calibrate(student(), FACES, RANGES_ONLY))
    found = values(calibrate(student(), FACES, RANGES_ONLY, run_dir=tmp_path))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_folder_belongs_to_one_calibration(tmp_path: Path) -> None:
    stopped(tmp_path, "observe", 1)
    for images, config, other in (
        (random_faces(24, seed=1), IN_EIGHTS, "images"),
        (FACES, replace(IN_EIGHTS, gptq=False), "settings"),
    ):
        with pytest.raises(ConfigError, match=f"run with different {other}: delete it, or choose another"):
            calibrate(student(), images, config, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="run with different layers"):
        calibrate(student("minmax"), FACES, IN_EIGHTS, run_dir=tmp_path)
    with alone_in(tmp_path), pytest.raises(ConfigError, match="another run is writing to"):
        calibrate(student(), FACES, IN_EIGHTS, run_dir=tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    stopped(tmp_path, "observe", 2)
    file = tmp_path / "calibration.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"calibration\.pt is damaged: delete it to start over"):
        calibrate(student(), FACES, IN_EIGHTS, run_dir=tmp_path)
