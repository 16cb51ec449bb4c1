"""Small networks of other packages go the whole way in ``benchmarks/networks.py``, and its table tells how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.scripts import run, script

PYTORCHCV = ("mobilenetv3_small_w1", "shufflenetv2_w1")
TRANSFORMERS = ("Swin", "ConvNeXt", "RegNet")


def measure(*arguments: str) -> dict[str, Any]:
    result = run("networks", "--runs", "0", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("package", "name"),
    [*(("pytorchcv", name) for name in PYTORCHCV), *(("transformers", name) for name in TRANSFORMERS)],
)
def test_a_network_of_others_goes_the_whole_way(package: str, name: str) -> None:
    pytest.importorskip(package)
    (row,) = measure("--names", name, "--no-onnx")["rows"]
    assert (row["refused"], row["agrees"], row["different_elsewhere"]) == (None, True, 0)
    assert 0.5 < row["integer_share"] <= 1
    assert row["float_operators"] or row["integer_share"] == 1
    assert row["size_ratio"] < (2 if package == "pytorchcv" else 8)  # constants of attention stay float


@pytest.mark.parametrize("name", ["ViT", "idiom: squeeze and excite by view"])
def test_the_onnx_of_a_network_goes_the_whole_way(name: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    (row,) = measure("--names", name)["rows"]
    assert (row["refused"], row["agrees"], row["onnx"], row["newer_onnx"]) == (None, True, "read", "read")
    assert row["onnx_different"] == 0 or row["float_operators"]


def test_an_idiom_is_a_network_too(tmp_path: Path) -> None:
    page = tmp_path / "table.md"
    (row,) = measure("--names", "idiom: max feature map", "--bits", "6", "-o", str(page))["rows"]
    assert (row["refused"], row["agrees"], row["different"], row["float_operators"]) == (None, True, 0, {})
    lines = page.read_text().splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1


def test_the_speed_is_that_of_both_files() -> None:
    result = run("networks", "--names", "idiom: split", "--runs", "2", "--json")
    (row,) = json.loads(result.output)["rows"]
    assert row["speed_ratio"] > 0


def test_a_network_that_is_refused_says_at_which_step(tmp_path: Path) -> None:
    networks = script("networks")
    idiom = networks.NETWORKS["idiom: split"]
    broken = networks.ForeignNetwork("broken", "idiom", lambda: idiom.build().stem, 32)
    row = networks.Measurement(broken, 8, 0, tmp_path).run()
    assert row.refused.startswith("capture: the network returns [N, 8, 16, 16]")
    assert len(networks.cells(row)) == len(networks.HEADINGS)


def test_a_network_that_its_package_cannot_build_says_so(tmp_path: Path) -> None:
    networks = script("networks")
    row = networks.Measurement(networks.ForeignNetwork("broken", "idiom", lambda: 1 / 0, 32), 8, 0, tmp_path).run()
    assert row.refused == "build: ZeroDivisionError: division by zero"


def test_an_unknown_network_is_refused() -> None:
    result = run("networks", "--names", "nobody's")
    assert result.exit_code != 0
    assert 'there is no network "nobody\'s"' in result.output
