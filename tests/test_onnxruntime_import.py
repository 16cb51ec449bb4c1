"""Packages of onnxruntime, each a folder on the path of a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def warnings_with(tmp_path: Path):
    """Install packages that provide a stand-in for onnxruntime, import it twice, and return the lines on stderr."""

    def warnings_with(*packages: str) -> list[str]:
        (tmp_path / "onnxruntime.py").write_text("InferenceSession = None\n")
        for package in packages:
            folder = tmp_path / f"{package.replace('-', '_')}-1.31.1.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.31.1\n")
        # Packages of this environment are left out, since one of them provides onnxruntime too.
        code = (
            f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]\n"
            "from qface.onnxruntime_import import import_onnxruntime\n"
            "import_onnxruntime(), import_onnxruntime()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stderr.splitlines()

    return warnings_with


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
def test_one_package_is_fine(package, warnings_with):
    assert warnings_with(package) == []


def test_two_packages_get_one_line_that_names_both(warnings_with):
    (line,) = warnings_with("onnxruntime", "onnxruntime-gpu")
    assert line.startswith("onnxruntime and onnxruntime-gpu are installed together")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in line
