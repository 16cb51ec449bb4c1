from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import qface
from tests.benchmarks.scripts import FOLDER, run, script

DOCS = FOLDER.parent / "docs"


def test_every_variant_is_a_file_with_figures_and_is_made_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    output, figures = data.parent / "runs", data.parent / "figures.json"
    options = ("--data", data, "-o", output, "--json", figures, "--max-steps", "1", "--ratios", "0.5", "--bits", "6")
    options += ("--round-to", "4")  # the network is a narrow one
    result = run("pruning", *options)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(figures.read_text())["rows"]}
    assert set(rows) == {
        *("float", "pruned0.5-unrepaired", "pruned0.5", "w6a6", "pruned0.5-w6a6"),
        *("pruned0.5-distilled", "w6a6-distilled", "pruned0.5-w6a6-distilled"),
    }
    assert rows["float"]["distance"] == pytest.approx(0, abs=1e-5)
    assert rows["pruned0.5"]["macs"] < rows["float"]["macs"]
    assert rows["pruned0.5-w6a6"]["macs"] == rows["pruned0.5"]["macs"]
    pruned, whole = rows["pruned0.5-w6a6"], rows["w6a6"]
    gain = (pruned["speedup"] / whole["speedup"]) / (whole["macs"] / pruned["macs"])
    assert pruned["gain_per_macs"] == pytest.approx(gain)
    for row in rows.values():
        assert (output / row["file"]).stat().st_size == row["bytes"]
        assert row["speedup"] > 0
    assert (output / "mobilefacenet.png").read_bytes().startswith(b"\x89PNG")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("made twice")

    for verb in ("prune", "export", "distill"):
        monkeypatch.setattr(qface, verb, again)
    assert run("pruning", *options).exit_code == 0


@pytest.mark.parametrize("network", ["iresnet18", "mobilefacenet"])
def test_published_figures_are_drawn_again(network: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    published = DOCS / "results" / f"pruning_{network}.json"
    result = run("pruning_report", published, "--figure", tmp_path / "figure.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (DOCS / "research" / "pruning.md").read_text(encoding="utf-8")
    for line in script("pruning_report").markdown(json.loads(published.read_text())["rows"]).splitlines()[2:]:
        cells = re.escape(line).split(r"\ \|\ ")
        cells[2] = r"-?[\d.]+"  # the loss was rounded after it was computed, not before
        assert re.search(r" \| ".join(cells).replace(r"\ ", " "), page), line


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"network": "mobilefacenet"}')
    result = run("pruning_report", tmp_path / "other.json")
    assert result.exit_code == 1
    assert "must be a JSON file of pruning.py: KeyError('rows')" in " ".join(result.output.split())


@pytest.mark.parametrize(("text", "name"), [("6", "w6a6"), ("w4a8", "w4a8")])
def test_bits_of_weights_and_activations_are_told_apart(text: str, name: str) -> None:
    module = script("pruning")
    assert module.name_of(module.BitsOption().convert(text, None, None)) == name


@pytest.mark.parametrize("text", ["9", "w4", "w4a9", "a8w4", "four"])
def test_other_bits_are_refused(text: str) -> None:
    result = run("pruning", "--bits", text)
    assert result.exit_code == 2
    assert "neither a number of bits from 2 to 8 nor two" in result.stderr
