import ast
import email
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qface

ROOT = Path(qface.__file__).parent


def test_importing_the_package_leaves_slow_libraries_alone() -> None:
    slow = ("torch", "onnx", "onnxruntime", "torch_pruning")
    code = f"import sys, qface; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", qface.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert hasattr(qface, name)
    assert name in dir(qface)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_only_the_quantization_package_touches_torch_ao() -> None:
    users = {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        if any(f"{name}.".startswith("torch.ao.") for name in imports(path))
    }
    assert users == {"quantization"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    """The archive that ``python -m build --sdist`` makes of the checkout."""
    checkout = ROOT.parent
    if not (checkout / "pyproject.toml").is_file():
        pytest.skip("qface is installed without its checkout")
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(checkout, folder / "checkout", ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "checkout", capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return tarfile.open(archive)


def test_the_sdist_can_be_tested_and_has_documentation_and_license(sdist: tarfile.TarFile) -> None:
    names = {name.partition("/")[2] for name in sdist.getnames()}
    for pattern in ("qface/**/*.py", "tests/**/*.py", "docs/**/*", "examples/**/*", "benchmarks/**/*.py"):
        found = {str(path.relative_to(ROOT.parent)) for path in ROOT.parent.glob(pattern) if path.is_file()}
        wanted = {name for name in found if "__pycache__" not in name}
        assert wanted and wanted <= names, sorted(wanted - names)[:3]
    assert names >= {"LICENSE", "CITATION.cff", "SECURITY.md", "Makefile", "constraints.txt", "qface/py.typed"}
    assert not [name for name in names if name.endswith((".pyc", ".onnx", ".safetensors"))]


def test_the_metadata_names_license_and_author(sdist: tarfile.TarFile) -> None:
    (member,) = (each for each in sdist.getmembers() if each.name.count("/") == 1 and each.name.endswith("/PKG-INFO"))
    file = sdist.extractfile(member)
    assert file is not None
    metadata = email.message_from_bytes(file.read())
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["Author"] == "The qface developers"
    assert metadata["Version"] == qface.__version__


@pytest.mark.parametrize("name", [name for name in qface.__all__ if not name.startswith("__")])
def test_everything_public_has_an_example(name: str) -> None:
    """The examples themselves run as doctests, in the folder that conftest.py makes."""
    assert ">>> " in (getattr(qface, name).__doc__ or "")
