"""``examples/browser`` in a headless Chromium: that of the part ``chromium``, or one that is installed.

Screenshots are left in the folder of the test.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnx
import onnxruntime
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import qface
from qface.data import TensorImages
from qface.deployment.golden import GoldenValues, golden_images, read_golden, write_golden
from qface.deployment.metadata import read_metadata
from qface.evaluation.match_thresholds import MatchThresholds
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.browser.devtools import Page
from tests.deployment.networks import calibrated
from tests.networks import random_faces, tiny_face_net
from tests.runtimes.parts import part_folder, reason_missing

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
SIZE = (32, 28)
PREPROCESSING = Preprocessing(
    crop=(0, 8, 112, 104), size=SIZE, color="BGR", mean=(127.5, 120.1, 99.9), std=(128, 63.3, 71.7)
)
PHONE, DESKTOP = 390, 1000
INSTALLED = ("chromium", "chromium-headless-shell", "google-chrome")


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of ``tmp_path / "site"``, which holds the page and onnxruntime-web."""
    if reason := reason_missing("web"):
        pytest.skip(reason)
    folder = tmp_path / "site"
    modules = part_folder("web") / "node_modules"
    subprocess.run([sys.executable, EXAMPLE / "build.py", "--modules", modules, folder], check=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """An empty page of a Chromium that this test alone uses."""
    command, environment = chromium()
    folder = tmp_path / "chromium"
    folder.mkdir()
    with Page([command], folder, environment) as page:
        yield page


def chromium() -> tuple[Path, dict[str, str]]:
    """The program and its environment variables."""
    folder = part_folder("chromium")
    if reason := reason_missing("chromium"):
        found = next(filter(None, map(shutil.which, INSTALLED)), None)
        if found is None:
            pytest.skip(reason)
        return Path(found), dict(os.environ)
    triplet = f"{platform.machine()}-linux-gnu"
    # This machine's libraries come first, since its loader fits only its own libc.
    libraries = [root / parent / triplet for root in (Path("/"), folder) for parent in ("usr/lib", "lib")]
    libraries.append(folder / "usr/lib" / triplet / "pulseaudio")  # libpulse looks for its parts there by full path
    variables = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "FONTCONFIG_SYSROOT": str(folder)}
    return folder / "usr" / "lib" / "chromium" / "chromium-headless-shell", {**os.environ, **variables}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The file of a student, which reads bytes, and that of its float network, which reads floats."""
    folder = tmp_path_factory.mktemp("exported")
    network = with_preprocessing(tiny_face_net(size=SIZE), PREPROCESSING)
    student = qface.export(calibrated(network, 6), folder / "student.onnx", input="uint8")
    return {"student": student, "float": qface.export(network, folder / "float.onnx")}


@pytest.fixture
def crops(tmp_path: Path) -> list[Path]:
    paths = []
    for number, face in enumerate(random_faces(2)):
        paths.append(tmp_path / f"face_{number}.png")
        Image.fromarray(face.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def cosine(file: Path, faces: Tensor) -> float:
    """By the onnxruntime of this Python.

    A file that reads bytes is given bytes: many pixels lie half way between two of them once they were resized, and
    those of normalized floats would be rounded either way.
    """
    if read_metadata(file)["input"] == "uint8":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        one, other = session.run(None, {"images": resized_to_bytes(faces).numpy()})[0]
    else:
        one, other = qface.evaluation.embed(file, TensorImages(faces))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def resized_to_bytes(faces: Tensor) -> Tensor:
    """Faces as PREPROCESSING crops and resizes them, rounded half to even."""
    top, left, bottom, right = PREPROCESSING.crop
    crops = faces[:, :, top:bottom, left:right].double()
    return F.interpolate(crops, SIZE, mode="bilinear", align_corners=False).float().round().byte()


def wait(page: Page, condition: str = "true") -> None:
    """Until the page has done all that it was asked, and ``condition`` is true."""
    idle = "document.querySelector('main')?.getAttribute('aria-busy') === 'false'"
    page.evaluate(
        f"new Promise((done) => (function look() {{ {idle} && {condition} ? done() : setTimeout(look, 20) }})())"
    )


def visit(page: Page, site: str) -> None:
    page.call("Page.navigate", url=site)
    wait(page)


def text(page: Page, name: str) -> str:
    found: str = page.evaluate(f"document.getElementById('{name}').innerText")
    return found


def complaints(page: Page) -> list[object]:
    """Errors and warnings that the console shows."""
    told = [event["params"] for event in page.events if event.get("method") == "Log.entryAdded"]
    entries = [entry["entry"]["text"] for entry in told if entry["entry"]["level"] in ("error", "warning")]
    others = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return entries + [event["params"] for event in page.events if event.get("method") in others]


def hosts(page: Page) -> set[str | None]:
    requests = [event["params"] for event in page.events if event.get("method") == "Network.requestWillBeSent"]
    urls = [urlsplit(request["request"]["url"]) for request in requests]
    return {url.hostname for url in urls if url.scheme != "data"}


def test_files_beside_the_page_are_compared(
    site: str, page: Page, exported: dict[str, Path], crops: list[Path], tmp_path: Path
) -> None:
    for name, path in exported.items():
        shutil.copy(path, tmp_path / "site" / f"{name}.onnx")
    faces = random_faces(2)
    expected = cosine(exported["student"], faces)
    rates = {"1e-3": expected - 0.01, "1e-4": expected + 0.01}
    qface.write_thresholds(tmp_path / "site" / "student.onnx", MatchThresholds(rates, 1234, 56, 700000))

    visit(page, site)
    for name, path in exported.items():
        assert text(page, f"{name}-verdict") == str(qface.selftest(path)).rpartition(", ")[0]
    assert float(text(page, "cosine")) == pytest.approx(cosine(exported["student"], samples()), abs=1e-4)
    assert text(page, "remark").startswith("Test images are not faces")

    page.choose("#face-file-0", *crops)
    wait(page, "document.getElementById('face-name-1').textContent === 'face_1.png'")
    assert float(text(page, "cosine")) == pytest.approx(expected, abs=1e-4)
    found = re.fullmatch(r"The float32 file finds a cosine of (.*)\.", text(page, "remark"))
    assert found is not None and float(found[1]) == pytest.approx(cosine(exported["float"], faces), abs=1e-4)
    assert text(page, "verdict") == "no match"
    assert "0.01 % of pairs of two people exceed it, measured on 1,234 images of 56 people" in text(page, "threshold")
    page.evaluate("fpr.value = '1e-3'; fpr.dispatchEvent(new Event('change'))")
    wait(page, "document.getElementById('verdict').textContent === 'match'")
    assert "0.1 % of pairs" in text(page, "threshold")

    sizes = [(tmp_path / "site" / f"{name}.onnx").stat().st_size for name in exported]
    assert [text(page, f"{name}-size") for name in exported] == [f"{size / 1e6:.2f} MB" for size in sizes]
    assert text(page, "size-ratio") == f"{sizes[0] / sizes[1]:.2f}"
    for latency in ("student-latency", "float-latency"):
        assert re.fullmatch(r"\d+\.\d+ ms", text(page, latency))
    assert re.fullmatch(r"\d+\.\d\d", text(page, "latency-ratio"))

    for name, width, dark in (("desktop", DESKTOP, False), ("phone", PHONE, False), ("phone_dark", PHONE, True)):
        page.screenshot(tmp_path / f"{name}.png", width, dark)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert complaints(page) == []
    assert hosts(page) == {"localhost"}


def samples() -> Tensor:
    """The images that the page draws."""
    return golden_images((112, 112), 2)


def test_files_that_are_chosen_or_dropped_are_used(
    site: str, page: Page, exported: dict[str, Path], crops: list[Path], tmp_path: Path
) -> None:
    changed = Path(shutil.copy(exported["student"], tmp_path / "changed.onnx"))
    golden = read_golden(changed)
    write_golden(changed, GoldenValues(golden.tolerance, golden.embeddings, (*golden.digests[:-1], 1)))
    visit(page, site)
    assert text(page, "student-name") == "none yet"

    page.choose("#student-file", changed)
    wait(page, "document.getElementById('student-name').textContent === 'changed.onnx'")
    assert text(page, "student-verdict").startswith("DIFFERS from what was trained: 1 of 16 embeddings differ")
    assert text(page, "verdict") == "no threshold"
    assert "holds no thresholds" in text(page, "threshold")
    assert ("ms" in text(page, "student-latency"), "ms" in text(page, "float-latency")) == (True, False)

    page.resize(DESKTOP)
    drop(page, "[data-drop='0']", *reversed(crops))
    wait(page, "document.getElementById('face-name-0').textContent === 'face_1.png'")
    assert float(text(page, "cosine")) == pytest.approx(cosine(changed, random_faces(2)), abs=1e-4)
    assert text(page, "face-name-1") == "face_0.png"


def drop(page: Page, selector: str, *files: Path) -> None:
    left, top = page.evaluate(
        f'(({{ left, top }}) => [left, top])(document.querySelector("{selector}").getBoundingClientRect())'
    )
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=left + 5, y=top + 5, data=data)


def test_what_cannot_be_used_is_told_in_one_line(
    site: str, page: Page, exported: dict[str, Path], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.onnx"
    model = onnx.load(exported["float"])
    del model.metadata_props[:]
    onnx.save(model, foreign)
    Image.new("RGB", (250, 200)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "damaged.onnx").write_bytes(exported["student"].read_bytes()[:1000])
    visit(page, site)
    for selector, file, expected in (
        ("#face-file-0", "photo.png", "photo.png has 250x200 pixels: align it to 112x112 first (qface align)"),
        ("#face-file-1", "notes.txt", "notes.txt is no image that this browser reads"),
        ("#student-file", "notes.txt", "notes.txt is no ONNX file"),
        ("#student-file", "foreign.onnx", "foreign.onnx does not say what it reads: write it by qface export"),
        ("#float-file", "damaged.onnx", "damaged.onnx does not say what it reads: write it by qface export"),
    ):
        page.choose(selector, tmp_path / file)
        wait(page, f"!error.hidden && error.textContent.startsWith('{file}')")
        assert text(page, "error") == expected
    page.choose("#student-file", exported["student"])
    wait(page, "document.getElementById('student-name').textContent === 'student.onnx'")
    assert page.evaluate("error.hidden")


def test_every_control_has_a_name(site: str, page: Page) -> None:
    visit(page, site)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if node["role"]["value"] in ("button", "combobox", "image", "progressbar")]
    names = [node.get("name", {}).get("value", "") for node in controls if not node["ignored"]]
    assert all(names) and len(set(names)) == len(names) >= 6


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_can_be_read(scheme: int) -> None:
    """Contrast of at least 4.5, as WCAG 2 asks of text (level AA)."""
    block = re.findall(r":root \{(.*?)\}", (EXAMPLE / "style.css").read_text(), re.DOTALL)[scheme]
    light = {name: luminance(digits) for name, digits in re.findall(r"--([\w-]+): #(\w+);", block)}
    pairs = [(text, paper) for text in ("text", "faint", "accent", "good", "bad") for paper in ("page", "card")]
    for text_color, paper in [*pairs, ("on-accent", "accent")]:
        darker, lighter = sorted((light[text_color], light[paper]))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text_color, paper)


def luminance(digits: str) -> float:
    """Relative luminance of a color of three or six hexadecimal digits, by WCAG 2."""
    six = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = np.array([int(six[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
