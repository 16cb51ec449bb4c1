from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import qface
from tests.benchmarks.scripts import run, script


def measure(data: Path, *arguments: str, rows: tuple[str, ...] = ()) -> tuple[Result, dict[str, Any]]:
    """What the command prints, and what it writes."""
    files = ("--data", data, "-o", data.parent / "runs", "--json", data.parent / "figures.json")
    wanted = [word for row in rows for word in ("--rows", row)]
    result = run("accuracy", *files, "--networks", "mobilefacenet", "--max-steps", "2", *wanted, *arguments)
    return result, json.loads((data.parent / "figures.json").read_text())


def test_every_kind_of_row_is_measured_for_every_recipe(data: Path) -> None:
    rows = ("w6a6-25%", "w4a8-untrained", "mixed-w4a8-untrained")
    chosen = ("--recipe", "qface", "--recipe", "paper", "--seeds", "1", "--epochs", "2")
    result, figures = measure(data, *chosen, rows=rows)
    assert result.exit_code == 0, result.output
    runs = figures["runs"]
    assert {(each["recipe"], each["row"]) for each in runs} == {
        (recipe, row) for recipe in ("qface", "paper") for row in rows
    }
    ranges = {
        (each["recipe"], each["settings"]["weight_observer"], each["settings"]["calibration"]["gptq"]) for each in runs
    }
    assert ranges == {("qface", "mse", True), ("paper", "minmax", False)}
    assert all(each["mean_weight_bits"] <= 4 for each in runs if each["row"] != "w6a6-25%")
    assert all(each["settings"]["training"]["epochs"] == 2 for each in runs if each["row"] == "w6a6-25%")
    page = (data.parent / "runs" / "accuracy.md").read_text().splitlines()
    assert len(page) == 2 + 1 + 6
    assert len({line.count("|") for line in page}) == 1


def test_seeds_choose_the_images(data: Path) -> None:
    _, figures = measure(data, "--seeds", "2", rows=("w6a6-25%",))
    assert [each["seed"] for each in figures["runs"]] == [0, 1]
    assert len({each["distance"] for each in figures["runs"]}) == 2
    assert figures["summary"][0]["seeds"] == 2


def test_figures_are_those_of_the_file(data: Path) -> None:
    _, figures = measure(data, "--seeds", "1", rows=("w6a6-untrained",))
    (measured,) = figures["runs"]
    file, folder = data.parent / "runs" / measured["file"], data / "data" / "lfw"
    expected = qface.evaluate(file, folder, pairs=data / "data" / "lfw_pairs.txt", identities="second-half")
    assert measured["accuracy"] == expected.accuracy
    assert measured["tpr"] == {fpr: expected.tpr_at_fpr[fpr] for fpr in ("1e-3", "1e-4", "1e-5")}
    teacher = data / "weights" / "mobilefacenet_112x96.safetensors"
    mixed = qface.evaluate(file, folder, identities="second-half", gallery=teacher)
    assert measured["gallery_tpr"]["1e-3"] == mixed.tpr_at_fpr["1e-3"]
    assert measured["bytes"] == file.stat().st_size


def test_an_interrupted_benchmark_shows_what_is_there_and_goes_on_behind_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    rows = ("w6a6-untrained", "w4a8")
    with monkeypatch.context() as patch:
        patch.setattr(qface, "distill", interrupt)
        result, figures = measure(data, "--seeds", "1", rows=rows)
    assert result.exit_code == 130
    assert [each["row"] for each in figures["runs"]] == ["w6a6-untrained"]
    assert "w6a6-untrained" in result.stdout

    result, figures = measure(data, "--seeds", "1", rows=rows)
    assert result.exit_code == 0, result.output
    assert [each["row"] for each in figures["runs"]] == list(rows)
    written = {path: path.stat().st_mtime_ns for path in (data.parent / "runs").glob("mobilefacenet*")}
    assert not any(path.is_dir() for path in written)

    monkeypatch.setattr(qface, "calibrate", interrupt)
    result, again = measure(data, "--seeds", "1", rows=rows)
    assert result.exit_code == 0, result.output
    assert again == figures
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert measure(data, "--seeds", "1", "--max-steps", "1", rows=rows)[0].exit_code == 130


def test_what_cannot_be_made_does_not_stop_the_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise qface.QFaceError("the loss is not finite")

    monkeypatch.setattr(qface, "distill", fail)
    result, figures = measure(data, "--seeds", "1", rows=("w6a6", "w6a6-untrained"))
    assert [each["row"] for each in figures["runs"]] == ["w6a6-untrained"]
    assert "w6a6-seed0 failed: the loss is not finite" in result.stderr
    assert result.exit_code == 1


def test_the_sweep_without_training_has_every_bit_width(data: Path) -> None:
    _, figures = measure(data, "--seeds", "1", "--sweep", "--no-train", rows=("w8a8",))
    names = {line["row"] for line in figures["summary"]}
    assert names == {f"w{bits}a{bits}-untrained" for bits in (8, 6, 4, 2)}


def measured(row: str, seed: int, rate: float) -> dict[str, Any]:
    """A run with this TPR at every rate."""
    rates = dict.fromkeys(("1e-3", "1e-4", "1e-5"), rate)
    which = {"network": "mobilefacenet", "recipe": "qface", "row": row, "seed": seed}
    size = {"distance": 0.01, "mean_weight_bits": 4.0, "bytes": 10**6, "seconds": None if seed else 20.0}
    return {**which, **size, "tpr": rates, "gallery_tpr": rates, "accuracy": 0.99}


def test_losses_are_means_over_seeds_held_against_goals() -> None:
    report = script("accuracy_report")
    teachers = {"mobilefacenet": measured("float", 0, 0.95)}
    rates = {"w6a6": (0.94, 0.945), "w4a8": (0.90, 0.91), "mixed-w4a8": (0.92, 0.93)}
    runs = [measured(row, seed, rate) for row, pair in rates.items() for seed, rate in enumerate(pair)]
    lines = {line["row"]: line for line in report.summarize(teachers, runs)}
    assert lines["w6a6"]["tpr_loss"] == pytest.approx({"mean": 0.75, "std": 0.5 / 2**0.5})
    assert lines["w6a6"]["seconds"]["mean"] == 20
    margins = {row: [goal["margin"] for goal in line["goals"]] for row, line in lines.items()}
    assert margins["w6a6"] == pytest.approx([0.5 - 0.75, 0.15, 0.4 - 0.75])
    assert margins["w4a8"] == pytest.approx([1 - 4.5])
    assert margins["mixed-w4a8"] == pytest.approx([2 - 1])
    page = report.markdown(lines.values(), teachers)
    assert "missed by 0.25; accuracy loss at most 0.15: met by 0.15" in page
    assert "0.75 ± 0.35" in page


def test_the_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = script("accuracy_report")
    runs = [measured("w8a8", 0, 0.94), measured("w2a2-untrained", 0, 0.01), measured("w4a8", 0, 0.9)]
    report.draw_sweep(report.summarize({"mobilefacenet": measured("float", 0, 0.95)}, runs), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_several_machines_are_put_together(tmp_path: Path) -> None:
    def write(name: str, rate: float, *runs: dict[str, Any]) -> Path:
        report = {"float": {"mobilefacenet": measured("float", 0, rate)}, "runs": runs}
        (tmp_path / name).write_text(json.dumps(report))
        return tmp_path / name

    first = write("first.json", 0.95, measured("w8a8", 0, 0.94), measured("w6a6", 0, 0.5))
    second = write("second.json", 0.9501, measured("w6a6", 0, 0.93), measured("w6a6", 1, 0.93))
    result = run("accuracy_report", first, second, "--json", tmp_path / "both.json")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "both.json").read_text())["summary"]
    assert {line["row"]: (line["seeds"], round(line["tpr_loss"]["mean"], 2)) for line in summary} == {
        "w8a8": (1, 1.0),
        "w6a6": (2, 2.0),
    }
    refused = run("accuracy_report", first, write("third.json", 0.99))
    assert refused.exit_code == 1
    assert "mobilefacenet by different images" in refused.output


def test_figures_of_few_people_have_rates_that_are_not_known(tmp_path: Path) -> None:
    teacher = measured("float", 0, 0.95)
    teacher["tpr"]["1e-5"] = None
    (tmp_path / "few.json").write_text(json.dumps({"float": {"mobilefacenet": teacher}, "runs": []}))
    twice = run("accuracy_report", tmp_path / "few.json", tmp_path / "few.json")
    assert twice.exit_code == 0, twice.output
