"""``examples/on_device``: what devices run without qface says the same as ``qface.selftest``.

JavaScript runs where ``make runtimes`` has installed onnxruntime-web; C++ is compiled where it has installed headers of
onnxruntime and there is a g++.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from torch import nn

import qface
from qface.deployment.golden import GoldenValues, golden_image, read_golden, write_golden
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.networks import calibrated
from tests.networks import random_faces, tiny_face_net
from tests.runtimes.parts import part_folder, reason_missing

ROOT = Path(__file__).parents[1]
COSINE = re.compile(r"-?\d\.\d{6}")
EXAMPLES = ROOT / "examples" / "on_device"
SIZES = ((112, 112), (112, 96), (32, 28), (15, 33))
PREPROCESSING = Preprocessing(
    crop=(0, 8, 112, 104), size=(32, 28), color="BGR", mean=(127.5, 120.1, 99.9), std=(128, 63.3, 71.7)
)

Say = Callable[[Path], tuple[int, str]]
"""Runs an example on a file: exit code, and what it printed."""


def network(preprocessing: Preprocessing = PREPROCESSING) -> nn.Module:
    return with_preprocessing(tiny_face_net(size=preprocessing.size), preprocessing)


def spoken(*command: str | Path) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with the JavaScript examples, in which Node finds onnxruntime-web."""
    if reason := reason_missing("web"):
        pytest.skip(reason)
    modules = part_folder("web") / "node_modules"
    folder = tmp_path / "node"
    folder.mkdir()
    for script in EXAMPLES.glob("*.mjs"):
        shutil.copy(script, folder)
    (folder / "node_modules").symlink_to(modules)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example with the library of the installed onnxruntime."""
    libraries = list(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if reason := reason_missing("headers"):
        pytest.skip(reason)
    if shutil.which("g++") is None or not libraries:
        pytest.skip("needs g++ and a libonnxruntime.so in the wheel of onnxruntime")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(libraries[0])  # the name that it has for the linker
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{folder}")
    include = f"-isystem{part_folder('headers') / 'usr' / 'include' / 'onnxruntime'}"
    files = (EXAMPLES / "selftest.cpp", libraries[0], "-o", folder / "selftest")
    subprocess.run(["g++", *flags, include, *files], check=True)
    return folder / "selftest"


def python_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_device_selftest", EXAMPLES / "selftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = ("6 uint8", "6 float32", "8 uint8", "fp16", "float32", "float network")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each of KINDS, and under its name with ``, changed`` the same with values that no runtime computes."""
    folder = tmp_path_factory.mktemp("files")
    students = {bits: calibrated(network(), bits) for bits in (6, 8)}
    files = {
        "fp16": qface.export(students[6], folder / "fp16.onnx", target="cuda"),
        "float32": qface.export(students[6], folder / "float32.onnx", target="float32"),
        "float network": qface.export(network(), folder / "float.onnx"),
    }
    for bits, dtype in ((6, "uint8"), (6, "float32"), (8, "uint8")):
        files[f"{bits} {dtype}"] = qface.export(students[bits], folder / f"w{bits}_{dtype}.onnx", input=dtype)
    for kind in KINDS:
        copied = Path(shutil.copy(files[kind], folder / f"{files[kind].stem}_changed.onnx"))
        files[f"{kind}, changed"] = with_other_values(copied)
    return files


def with_other_values(path: Path) -> Path:
    """``path`` with golden values of which one embedding and, where there are any, two digests differ."""
    golden = read_golden(path)
    embeddings = golden.embeddings.copy()
    embeddings[1, 0] += 1 + abs(embeddings[1]).sum()
    digests = tuple(digest ^ (number in (1, 15)) for number, digest in enumerate(golden.digests))
    write_golden(path, GoldenValues(golden.tolerance, embeddings, digests))
    return path


def assert_says_as_qface(say: Say, files: dict[str, Path], kind: str) -> None:
    """``say`` finds what :func:`qface.selftest` finds, in a file and where it was changed."""
    for name, code, verdict in ((kind, 0, "computes"), (f"{kind}, changed", 1, "DIFFERS from")):
        expected = str(qface.selftest(files[name])).rpartition(", ")[0]
        assert expected.startswith(f"{verdict} what was trained")
        found, words = say(files[name])
        assert COSINE.sub("#", words).startswith(COSINE.sub("#", expected) + ", onnxruntime")
        # Two runtimes may round the last digit of a float file's cosine otherwise.
        cosines = [[float(number) for number in COSINE.findall(text)] for text in (words, expected)]
        assert cosines[0] == pytest.approx(cosines[1], abs=2e-6)
        assert found == code


# ---- the images, byte for byte


def test_python_makes_the_images() -> None:
    example = python_example()
    for number, (height, width) in enumerate(SIZES):
        assert np.array_equal(example.golden_image(number, height, width), golden_image(number, (height, width)))


def test_javascript_makes_the_images(node: Path) -> None:
    script = (
        "import { writeFileSync } from 'node:fs'; import { goldenImage } from './qface.mjs';"
        f"{json.dumps(SIZES)}.forEach(([h, w], number) => writeFileSync(`${{number}}`, goldenImage(number, h, w)));"
    )
    subprocess.run(["node", "--input-type=module", "-e", script], cwd=node, check=True)
    for number, size in enumerate(SIZES):
        assert (node / str(number)).read_bytes() == golden_image(number, size).tobytes()


# ---- the verdicts


@pytest.mark.parametrize("kind", KINDS)
def test_python_says_what_qface_says(kind: str, files: dict[str, Path]) -> None:
    assert_says_as_qface(lambda file: spoken(sys.executable, EXAMPLES / "selftest.py", file), files, kind)


def test_python_needs_neither_qface_nor_torch() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "selftest.py").read_text(), re.MULTILINE)
    assert set(imported) == {"base64", "json", "sys", "zlib", "numpy", "onnxruntime"}


@pytest.mark.parametrize("runtime", ["onnxruntime-web", "onnxruntime-node"])
@pytest.mark.parametrize("kind", KINDS)
def test_javascript_says_what_qface_says(kind: str, runtime: str, node: Path, files: dict[str, Path]) -> None:
    if not (node / "node_modules" / runtime).is_dir():
        pytest.skip(f"{runtime} is not installed beside onnxruntime-web")
    assert_says_as_qface(lambda file: spoken("node", node / "selftest.mjs", file, runtime), files, kind)


@pytest.mark.parametrize("kind", ["6 uint8", "8 uint8"])
def test_cpp_says_what_qface_says(kind: str, compiled: Path, files: dict[str, Path]) -> None:
    for name, code in ((kind, 0), (f"{kind}, changed", 1)):
        expected = str(qface.selftest(files[name])).partition(", minimum cosine")[0]
        found, words = spoken(compiled, files[name])
        assert words.startswith(f"{expected}, onnxruntime {onnxruntime.__version__}")
        assert found == code


def test_cpp_refuses_files_that_read_floats(compiled: Path, files: dict[str, Path]) -> None:
    done = subprocess.run([compiled, files["6 float32"]], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no file of integers that reads bytes" in done.stderr


@pytest.mark.parametrize("language", ["python", "javascript"])
def test_files_without_golden_values_are_refused(
    language: str, files: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "old.onnx"
    model = onnx.load(files["6 uint8"])
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != "golden"}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, path)
    if language == "python":
        command: list[str | Path] = [sys.executable, EXAMPLES / "selftest.py", path]
    else:
        command = ["node", request.getfixturevalue("node") / "selftest.mjs", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no golden values" in done.stderr


# ---- docs/on_device.md


def test_the_lines_of_the_page_embed_a_face(tmp_path: Path) -> None:
    student = calibrated(network(Preprocessing(crop=(0, 8, 112, 104), size=(112, 96))), 6)
    qface.export(student, tmp_path / "student.onnx", input="uint8")
    (face,) = random_faces(1)
    Image.fromarray(face.permute(1, 2, 0).numpy()).save(tmp_path / "face.png")
    page = (ROOT / "docs" / "on_device.md").read_text()
    code = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "face.png" in code)
    assert len(code.strip().splitlines()) <= 9  # five, the imports and a blank line
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(embedding.tolist())"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    expected = qface.evaluation.embed(tmp_path / "student.onnx", qface.data.TensorImages(face[None]))
    assert np.allclose(json.loads(done.stdout), expected[0], atol=1e-6)
