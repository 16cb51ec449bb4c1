import ast
import email
import email.message
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
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


TORCH_AO = {
    "quantization/fake_quantize.py": {"fake_quantize.FakeQuantizeBase"},
    "quantization/observers.py": {"observer.ObserverBase"},
    "quantization/prepare.py": {
        "QConfig",
        "QConfigMapping",
        "backend_config.BackendConfig",
        "backend_config.BackendPatternConfig",
        "backend_config.DTypeConfig",
        "backend_config.ObservationType",
        "fx.custom_config.PrepareCustomConfig",
        "quantize_fx.prepare_qat_fx",
    },
}
"""All that must be replaced when torch drops torch.ao: file of qface to names of torch.ao.quantization."""


def test_torch_ao_is_used_in_few_places_of_one_package() -> None:
    prefix = "torch.ao.quantization."
    used = {
        str(path.relative_to(ROOT)): {
            name.removeprefix(prefix) for name in imports(path) if f"{name}.".startswith("torch.ao.")
        }
        for path in ROOT.rglob("*.py")
    }
    assert {file: names for file, names in used.items() if names} == TORCH_AO


def build(command: str, checkout: Path, folder: Path) -> Path:
    """Run a command of the build backend as ``python -m build`` does, without an environment of its own."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{command}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=checkout, check=True
    )
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive that ``python -m build --sdist`` makes of the checkout."""
    checkout = ROOT.parent
    if not (checkout / "pyproject.toml").is_file():
        pytest.skip("qface is installed without its checkout")
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(checkout, folder / "checkout", ignore=ignored)
    archive = build("build_sdist", folder / "checkout", folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_can_be_tested_and_has_documentation_and_license(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    for pattern in ("qface/**/*.py", "tests/**/*.py", "docs/**/*", "examples/**/*", "benchmarks/**/*.py"):
        found = {str(path.relative_to(ROOT.parent)) for path in ROOT.parent.glob(pattern) if path.is_file()}
        wanted = {name for name in found if "__pycache__" not in name}
        assert wanted and wanted <= names, sorted(wanted - names)[:3]
    assert names >= {"LICENSE", "CITATION.cff", "SECURITY.md", "Makefile", "constraints.txt", "qface/py.typed"}
    assert names >= {"mkdocs.yml", "setup.py", "conftest.py", "ruff.toml"}
    assert not [name for name in names if name.endswith((".pyc", ".onnx", ".safetensors"))]


def wheel_metadata(sdist: Path, folder: Path) -> email.message.Message:
    """Build the wheel of an unpacked sdist and return its metadata."""
    with zipfile.ZipFile(build("build_wheel", sdist, folder)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def with_url(sdist: Path, url: str | None, folder: Path) -> Path:
    """Copy an unpacked sdist and set the repository's URL in its setup.cfg, or remove it."""
    copy = folder / "copy"
    shutil.copytree(sdist, copy)
    settings = (copy / "setup.cfg").read_text(encoding="utf-8")
    settings = re.sub(r"^url = .*\n", "", settings, flags=re.MULTILINE)
    if url:
        settings = settings.replace("[metadata]\n", f"[metadata]\nurl = {url}\n")
    (copy / "setup.cfg").write_text(settings, encoding="utf-8")
    return copy


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_metadata_names_license_and_author(sdist: Path, tmp_path: Path) -> None:
    metadata = wheel_metadata(with_url(sdist, None, tmp_path), tmp_path)
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["Author"] == "The qface developers"
    assert metadata["Version"] == qface.__version__


def test_links_of_the_readme_become_text_where_the_repository_has_no_url(sdist: Path, tmp_path: Path) -> None:
    metadata = wheel_metadata(with_url(sdist, None, tmp_path), tmp_path)
    assert metadata["Description-Content-Type"] == "text/markdown" and "Project-URL" not in metadata
    description = metadata.get_payload()
    assert description.startswith("# qface") and "docs/results.md" in description
    assert all("://" in link or link.startswith("#") for link in links(description))


def test_links_of_the_readme_lead_to_the_repository_where_its_url_is_known(sdist: Path, tmp_path: Path) -> None:
    url = "https://example.org/qface"
    metadata = wheel_metadata(with_url(sdist, url, tmp_path), tmp_path)
    description = metadata.get_payload()
    assert f"]({url}/blob/main/docs/results.md)" in description
    assert all("://" in link or link.startswith("#") for link in links(description))
    assert f"Changelog, {url}/blob/main/CHANGELOG.md" in metadata.get_all("Project-URL")


@pytest.mark.parametrize("name", [name for name in qface.__all__ if not name.startswith("__")])
def test_everything_public_has_an_example(name: str) -> None:
    """The examples themselves run as doctests, in the folder that conftest.py makes."""
    assert ">>> " in (getattr(qface, name).__doc__ or "")
