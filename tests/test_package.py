import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qface

ROOT = Path(qface.__file__).parent


def test_importing_the_package_leaves_slow_libraries_alone() -> None:
    code = "import sys, qface; print([m for m in ('onnxruntime', 'torch_pruning') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", qface.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert hasattr(qface, name)


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
