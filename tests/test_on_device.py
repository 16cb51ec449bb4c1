"""``examples/on_device``: what devices run without qface says the same as ``qface.selftest``.

JavaScript runs where ``make runtimes`` has installed onnxruntime-web; C++ is compiled where there is a g++, without
onnxruntime.
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


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], Path]:
    """Compiles the body of a C++ ``main`` that uses golden.hpp."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def compile_main(body: str) -> Path:
        source, program = tmp_path / "main.cpp", tmp_path / "main"
        source.write_text(f'#include <cstdio>\n#include "golden.hpp"\nint main(int, char** arguments) {{{body}}}\n')
        flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{EXAMPLES}")
        subprocess.run(["g++", *flags, source, "-o", program], check=True)
        return program

    return compile_main


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
    """``path`` with golden values of which one embedding and, where there are any, one digest differ."""
    golden = read_golden(path)
    embeddings = golden.embeddings.copy()
    embeddings[1, 0] += 1 + abs(embeddings[1]).sum()
    digests = (*golden.digests[:-1], golden.digests[-1] ^ 1) if golden.digests else ()
    write_golden(path, GoldenValues(golden.tolerance, embeddings, digests))
    return path


def assert_says_as_qface(say: Say, files: dict[str, Path], kind: str) -> None:
    """``say`` finds what :func:`qface.selftest` finds, in a file and where it was changed."""
    for name, code, verdict in ((kind, 0, "computes"), (f"{kind}, changed", 1, "DIFFERS from")):
        expected = str(qface.selftest(files[name])).rpartition(", ")[0]
        assert expected.startswith(f"{verdict} what was trained")
        found, words = say(files[name])
        assert words.startswith(expected + ", onnxruntime")
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


def test_cpp_makes_the_images(compiled: Callable[[str], Path]) -> None:
    program = compiled(
        "const auto image = qface::golden_image(std::strtoul(arguments[1], 0, 10), std::atoi(arguments[2]), "
        "std::atoi(arguments[3])); std::fwrite(image.data(), 1, image.size(), stdout);"
    )
    for number, size in enumerate(SIZES):
        made = subprocess.run([program, *map(str, (number, *size))], capture_output=True, check=True).stdout
        assert made == golden_image(number, size).tobytes()


# ---- the verdicts


@pytest.mark.parametrize("kind", KINDS)
def test_python_says_what_qface_says(kind: str, files: dict[str, Path]) -> None:
    assert_says_as_qface(lambda file: spoken(sys.executable, EXAMPLES / "selftest.py", file), files, kind)


def test_python_needs_neither_qface_nor_torch() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "selftest.py").read_text(), re.MULTILINE)
    assert set(imported) == {"base64", "json", "sys", "numpy", "onnxruntime"}


@pytest.mark.parametrize("runtime", ["onnxruntime-web", "onnxruntime-node"])
@pytest.mark.parametrize("kind", KINDS)
def test_javascript_says_what_qface_says(kind: str, runtime: str, node: Path, files: dict[str, Path]) -> None:
    if not (node / "node_modules" / runtime).is_dir():
        pytest.skip(f"{runtime} is not installed beside onnxruntime-web")
    assert_says_as_qface(lambda file: spoken("node", node / "selftest.mjs", file, runtime), files, kind)


def test_cpp_says_what_qface_says(compiled: Callable[[str], Path], files: dict[str, Path], tmp_path: Path) -> None:
    """Of embeddings from a file, since onnxruntime's headers are in no package that the tests install."""
    program = compiled(
        "const qface::Golden golden(arguments[1]);"
        "std::vector<qface::Embedding> found(golden.images(), qface::Embedding(golden.embeddings[0].size()));"
        'std::FILE* file = std::fopen(arguments[2], "rb");'
        "for (auto& each : found) if (std::fread(each.data(), 4, each.size(), file) != each.size()) return 2;"
        "std::string words; const bool agrees = golden.compare(found, words);"
        'std::printf("%s, onnxruntime", words.c_str()); return agrees ? 0 : 1;'
    )
    example = python_example()

    def say(file: Path) -> tuple[int, str]:
        session, metadata = example.open_session(str(file))
        images = [golden_image(number, PREPROCESSING.size) for number in range(read_golden(file).images)]
        found = np.stack([example.embed(session, metadata, image) for image in images])
        found.tofile(tmp_path / "found.bin")
        return spoken(program, metadata["golden"], tmp_path / "found.bin")

    for kind in ("6 uint8", "float network"):
        assert_says_as_qface(say, files, kind)


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
