from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from qface.errors import ConfigError, DependencyError, ExportError
from qface.mixed_precision import LayerSensitivity, Sensitivity
from qface.reporting.figures import sensitivity_figure
from qface.reporting.tables import sensitivity_tables

RESULT = Sensitivity(
    images=12,
    layers=(
        LayerSensitivity("stem.conv", 216, {2: 0.5, 8: 0.0}, {}),
        LayerSensitivity("fc", 8192, {2: 0.25, 8: 0.001}, {4: 0.0125}),
    ),
)
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def printed(result: Sensitivity) -> list[list[str]]:
    console = Console(width=100, record=True)
    with console.capture() as capture:
        console.print(sensitivity_tables(result))
    return [line.split() for line in capture.get().splitlines()]


def test_tables_hold_every_loss_in_thousandths() -> None:
    lines = printed(RESULT)
    assert ["stem.conv", "216", "500.000", "0.000"] in lines
    assert ["fc", "8,192", "250.000", "1.000"] in lines
    assert ["stem.conv", "216", "-"] in lines
    assert ["fc", "8,192", "12.500"] in lines


@pytest.mark.parametrize("ending", BEGINNINGS)
def test_a_figure_is_written_in_the_form_of_its_ending(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure{ending}"
    assert sensitivity_figure(RESULT, path) == path
    assert path.read_bytes().startswith(BEGINNINGS[ending])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["figure.txt", "figure", "absent/figure.png"])
def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ExportError, match=name):
        sensitivity_figure(RESULT, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"qface\[figures\]"):
        sensitivity_figure(RESULT, tmp_path / "figure.png")


def test_a_sensitivity_is_read_from_what_it_writes() -> None:
    assert Sensitivity.from_dict(RESULT.to_dict()) == RESULT
    with pytest.raises(ConfigError, match="no sensitivity"):
        Sensitivity.from_dict({"images": 3})
