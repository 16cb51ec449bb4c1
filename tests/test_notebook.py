"""The notebook runs from its first to its last cell, on random crops and a tiny network in the layout of QFACE_DATA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qface
from tests.crops import write_crops
from tests.networks import tiny_face_net

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(qface.__file__).parents[1] / "examples" / "notebook" / "qface.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_notebook_runs_and_shows_its_results_as_tables(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_crops(tmp_path / "data" / "lfw", {f"Person_{number:02}": 3 for number in range(8)}, "jpg")
    (tmp_path / "weights").mkdir()
    qface.save(tiny_face_net(), tmp_path / "weights" / "mobilefacenet_112x96.safetensors")
    monkeypatch.setenv("QFACE_DATA", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))  # The kernel imports the same qface.
    for variable in ("HOME", "TMPDIR"):  # The kernel writes to both.
        monkeypatch.setenv(variable, str(tmp_path))
    done = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [output for cell in done.cells for output in cell.get("outputs", ()) if output.output_type != "stream"]
    assert [output.data["text/html"][:6] for output in shown] == ["<table"] * 5
