"""Small networks of other packages go the whole way in ``benchmarks/networks.py``, and its table tells how it ended."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks.scripts import run, script

PYTORCHCV = ("mobilenetv3_small_w1", "shufflenetv2_w1")
TRANSFORMERS = ("Swin", "ConvNeXt", "RegNet")


def measure(*arguments: str) -> dict[str, Any]:
    result = run("networks", "--runs", "0", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PYTORCHCV)
def test_a_network_of_pytorchcv_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorchcv")
    row = measure_shortened(name, tmp_path, onnx=False)
    assert_whole_way(row)
    assert row["size_ratio"] < 2


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_network_of_transformers_goes_the_whole_way(name: str) -> None:
    pytest.importorskip("transformers")
    (row,) = measure("--names", name, "--no-onnx")["rows"]
    assert_whole_way(row)
    assert row["size_ratio"] < 8  # constants of attention stay float


def assert_whole_way(row: dict[str, Any]) -> None:
    assert (row["refused"], row["agrees"], row["different_elsewhere"]) == (None, True, 0)
    assert 0.5 < row["integer_share"] <= 1
    assert row["float_operators"] or row["integer_share"] == 1


def test_the_onnx_of_a_transformer_goes_the_whole_way(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    assert_read(measure_shortened("ViT", tmp_path, onnx=True))


def test_the_onnx_of_an_idiom_goes_the_whole_way() -> None:
    pytest.importorskip("onnxscript")
    (row,) = measure("--names", "idiom: squeeze and excite by view")["rows"]
    assert_read(row)


def assert_read(row: dict[str, Any]) -> None:
    assert (row["refused"], row["agrees"], row["onnx"], row["newer_onnx"]) == (None, True, "read", "read")
    assert row["onnx_different"] == 0 or row["float_operators"]


def measure_shortened(name: str, folder: Path, onnx: bool) -> dict[str, Any]:
    networks = script("networks")
    whole = networks.NETWORKS[name]
    shortened = replace(whole, make=lambda: without_repeats(whole.make()))
    return asdict(networks.Measurement(shortened, 8, 0, folder, onnx).run())


def without_repeats(model: nn.Module) -> nn.Module:
    """``model`` without the blocks that have the shapes of the block before: they add time and no kind of layer."""
    for sequence in list(model.modules()):
        if isinstance(sequence, (nn.Sequential, nn.ModuleList)):
            blocks = [(shapes_of(block), name) for name, block in sequence.named_children() if any(block.children())]
            for (before, _), (shapes, name) in pairwise(blocks):
                if shapes == before:
                    delattr(sequence, name)
    return model


def shapes_of(block: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in block.state_dict().items()]


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
