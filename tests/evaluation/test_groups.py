"""Error rates of groups against their definitions, pair by pair."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.data.folders import ImageFolder
from qface.data.groups import Grouping, read_groups
from qface.errors import ConfigError, ImagesError
from qface.evaluation import bootstrap, evaluate_groups, groups, pair_scores
from qface.evaluation.bootstrap import Interval
from qface.evaluation.groups import measure_groups

FPR, NEEDED = "0.2", 50


def faces(labels: np.ndarray, seed: int) -> np.ndarray:
    """Small whole numbers: products are exact and ties are many."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(labels.max() + 1, 6))[labels] * 3 + 2 * rng.normal(size=(len(labels), 6))
    return np.round(rows).astype(np.float32)


def draw(people: int) -> np.ndarray:
    """The multiplicities of the first replicate."""
    return np.random.default_rng(0).multinomial(people, np.full(people, 1 / people))


def obvious_rates(rows: np.ndarray, labels: np.ndarray, of_person: np.ndarray, weights: np.ndarray) -> list:
    """Threshold, and numbers of pairs and of errors by group; a pair of i and j is there as often as both are drawn."""
    pairs = [
        (rows[i] @ rows[j], labels[i], labels[j], int(weights[labels[i]] * weights[labels[j]]))
        if labels[i] != labels[j]
        else (rows[i] @ rows[j], labels[i], labels[j], int(weights[labels[i]]))
        for i, j in itertools.combinations(range(len(rows)), 2)
    ]
    impostors = sorted((score for score, a, b, times in pairs if a != b for _ in range(times)), reverse=True)
    threshold = impostors[len(impostors) // 5]
    found = []
    for group in range(3):
        inside = [pair for pair in pairs if of_person[pair[1]] == of_person[pair[2]] == group]
        genuine = [(score <= threshold, times) for score, a, b, times in inside if a == b]
        matched = [(score > threshold, times) for score, a, b, times in inside if a != b]
        found.append([(sum(t for _, t in kind), sum(t for wrong, t in kind if wrong)) for kind in (genuine, matched)])
    return [threshold, *found]


def share(count: tuple[int, int]) -> float | None:
    return count[1] / count[0] if count[0] else None


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 2)), min_size=14, max_size=22),
    st.integers(0, 2**32 - 1),
    st.sampled_from([7, 2048]),
    st.booleans(),
)
def test_rates_and_gaps_are_those_of_each_pair(
    people: list[tuple[int, int]], seed: int, tile: int, with_replicate: bool
) -> None:
    labels = np.repeat(np.arange(len(people) + 1), [3, *(images for images, _ in people)])
    of_person = np.array([0, *(group for _, group in people)])
    both = [faces(labels, seed), faces(labels, seed + 1)]
    with (
        mock.patch.object(pair_scores, "_TILE_SIZE", tile),
        mock.patch.object(groups, "GENUINE_NEEDED", 10),
        mock.patch.object(bootstrap, "_with_margin", lambda rank: rank),  # replicates need more scores at first
    ):
        grouping = Grouping(("a", "b", "c"), of_person)
        result = measure_groups(both, labels, grouping, FPR, bootstrap=int(with_replicate))
    once = np.ones(len(of_person), np.int64)
    gaps: list[list[float | None]] = [[], []]
    for rows, model in zip(both, (result.model, result.reference), strict=True):
        threshold, *expected = obvious_rates(rows, labels, of_person, once)
        repeated = obvious_rates(rows, labels, of_person, draw(len(once)))[1:] if with_replicate else [None] * 3
        assert model.threshold == threshold
        for group, counts, again in zip(result.groups, expected, repeated, strict=True):
            assert (group.genuine_pairs, group.impostor_pairs) == (counts[0][0], counts[1][0])
            found = model.rates[group.name]
            for kind, (estimate, needed) in enumerate(((found.fnmr, 10), (found.fmr, NEEDED))):
                enough = counts[kind][0] >= needed
                assert estimate.value == (pytest.approx(share(counts[kind])) if enough else None)
                ends = share(again[kind]) if again and enough else None
                assert estimate.interval == (None if ends is None else Interval(*[pytest.approx(ends)] * 2))
        missed, matched = (
            [share(each[kind]) for each in expected if each[kind][0] >= needed]
            for kind, needed in enumerate((10, NEEDED))
        )
        gaps[0].append(max(missed) - min(missed) if len(missed) > 1 else None)
        gaps[1].append((max(matched) / min(matched) if min(matched) else None) if len(matched) > 1 else None)
        for gap, size in zip((model.fnmr_gap, model.fmr_gap), (gaps[0][-1], gaps[1][-1]), strict=True):
            if gap is None or size is None:
                assert size is None and (gap is None or gap.size.value is None)
            else:
                assert gap.size.value == pytest.approx(size) and gap.highest != gap.lowest
    changes = (result.fnmr_gap_change, result.fmr_gap_change)
    for change, (after, before), compare in zip(changes, gaps, (np.subtract, np.divide), strict=True):
        value = None if change is None else change.value
        assert value == (None if after is None or before is None else pytest.approx(compare(after, before)))
    assert result.ungrouped == np.count_nonzero(of_person < 0)
    assert json.loads(json.dumps(result.to_dict()))["model"]["rates"].keys() == {"a", "b", "c"}


def many(people: int, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, rng = np.repeat(np.arange(people), 4), np.random.default_rng(0)
    rows = rng.normal(size=(people, 8))[labels] + spread[labels, None] * rng.normal(size=(len(labels), 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def test_a_model_that_fails_one_group_widens_the_gap() -> None:
    halves = Grouping(("even", "odd"), np.arange(120) % 2)
    sound, labels = many(120, np.full(120, 0.3))
    rough, _ = many(120, np.where(halves.of_person == 1, 0.7, 0.3))
    result = measure_groups([rough, sound], labels, halves, "1e-2", bootstrap=100)
    assert (result.model.fnmr_gap.highest, result.model.fnmr_gap.lowest) == ("odd", "even")
    change = result.fnmr_gap_change
    assert 0 < change.interval.low < change.value < change.interval.high
    gap = result.model.fnmr_gap.size
    assert gap.interval.low < gap.value < gap.interval.high
    same = measure_groups([sound, sound], labels, halves, "1e-2", bootstrap=10)
    assert (same.fnmr_gap_change.value, same.fnmr_gap_change.interval) == (0, Interval(0, 0))
    assert same.fmr_gap_change.value == 1


def test_a_ratio_to_no_false_match_is_not_told() -> None:
    labels = np.repeat(np.arange(80), 4)
    rows = np.eye(80, dtype=np.float32)[labels]
    rows[labels >= 40] = np.eye(80, dtype=np.float32)[40 + labels[labels >= 40] % 2]  # the second half looks alike
    result = measure_groups([rows], labels, Grouping(("a", "b"), np.arange(80) // 40), "1e-2", bootstrap=5)
    fmr_gap = result.model.fmr_gap
    assert result.model.rates["a"].fmr.value == 0
    assert fmr_gap is not None and fmr_gap.size.value is None and fmr_gap.size.interval is None


def test_rates_that_cannot_be_measured_are_refused() -> None:
    rows, labels = many(20, np.full(20, 0.3))
    one = Grouping(("all",), np.zeros(20, np.int64))
    with pytest.raises(ImagesError, match="FPR 1e-4 needs 100,000 impostor pairs"):
        measure_groups([rows], labels, one, "1e-4")
    with pytest.raises(ConfigError, match="decimal"):
        measure_groups([rows], labels, one, "2")
    result = measure_groups([rows], labels, one, "1e-2")
    assert result.model.fnmr_gap is None and result.model.fmr_gap is None


def listed(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_each_person_a_group(crops, tmp_path: Path) -> None:
    folder = crops({"Ann": 1, "Bob": 1, "Cid, Jr": 1, "Zoe\u0308": 1})
    file = listed(tmp_path / "groups.csv", "\ufeffZoë,x\n\nCid, Jr, y \nAnn\tx, too\n")
    found = read_groups(file, ImageFolder(folder))
    assert found.names == ("x", "x, too", "y")
    assert found.of_person.tolist() == [1, -1, 2, 0] and found.ungrouped == 1
    chosen = listed(tmp_path / "people.txt", "Bob\nZoë\n")
    selected = read_groups(file, ImageFolder(folder, chosen))
    assert (selected.names, selected.of_person.tolist()) == (("x",), [-1, 0])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Ann,x\nBob\n", r"line 2: expected 'identity,group', got 'Bob'"),
        ("Ann,x\nBob,\n", "line 2"),
        (",x\n", "line 1"),
        ("Ann,x\nBob,x\nAnn,x\n", r"1 identities are in .* more than once \(first: Ann\)"),
        ("Ann,x\nDan,x\nEve,x\n", r"2 identities are in .* no images in the folder \(first: Dan\)"),
        ("\n", "no group of 2 identities"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(text: str, hint: str, crops, tmp_path: Path) -> None:
    folder = ImageFolder(crops({"Ann": 1, "Bob": 1}))
    with pytest.raises(ImagesError, match=hint):
        read_groups(listed(tmp_path / "groups.csv", text), folder)


def test_images_without_names_have_no_groups(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="groups need identities with names"):
        evaluate_groups("student.onnx", torch.zeros(2, 3, 112, 112), tmp_path / "groups.csv")


def test_the_command_prints_tables_and_json(crops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qface.cli import main

    (tmp_path / "pooled_network.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = crops({f"{letter}{number}": 3 for letter in "ab" for number in range(6)} | {"c": 1})
    file = listed(
        tmp_path / "g.csv", "".join(f"{letter}{number},[{letter}]\n" for letter in "ab" for number in range(6))
    )
    arguments = ["evaluate", "pooled_network:make", "--images", str(folder), "--groups", str(file), "--at-fpr", "0.1"]
    shown = CliRunner().invoke(main, [*arguments, "--bootstrap", "3"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    for text in ("[a]", "too few", "1 people are in no group", "a group needs 100 genuine pairs", "95 % confidence"):
        assert text in shown.stdout
    compared = CliRunner().invoke(main, [*arguments, "--reference", "pooled_network:make", "--json"])
    record = json.loads(compared.stdout)
    assert [group["impostor_pairs"] for group in record["groups"]] == [135, 135]
    assert record["model"]["rates"]["[a]"]["fnmr"]["value"] is None
    assert record["fmr_gap_change"]["value"] in (1.0, None)
    alone = CliRunner().invoke(main, [*arguments[:4], "--at-fpr", "0.1"])
    assert alone.exit_code == 2 and "--at-fpr needs --groups: give that as well" in alone.stderr
    for extra in (["--pairs", "pairs.txt"], ["--run-dir", str(tmp_path)]):
        refused = CliRunner().invoke(main, [*arguments, *extra])
        assert refused.exit_code == 2 and f"{extra[0]} cannot be used with --groups" in refused.stderr
