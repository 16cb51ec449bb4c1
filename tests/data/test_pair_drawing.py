"""Lists drawn from a folder: balanced, without repeats, of people who are in one fold alone, and read as written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qface.cli import main
from qface.data import ImageFolder, read_pairs, resolve_pairs
from qface.data.pair_drawing import draw_pairs, make_pairs, write_pairs
from qface.errors import ConfigError, PairsError

PEOPLE = {"Ann": 6, "Bob": 1, "Cem": 3, "Dee": 2, "Eva": 3, "Fay": 2, "Gil": 1, "Hal": 1, "Ida": 2}


@pytest.fixture
def folder(crops) -> ImageFolder:
    return ImageFolder(crops(PEOPLE))


def test_folds_are_balanced_without_repeats_and_share_nobody(folder: ImageFolder) -> None:
    pairs, labels = draw_pairs(folder, folds=3, pairs_per_fold=4, seed=1), folder.labels.numpy()
    assert len(pairs) == 24
    people = []
    for fold in range(3):
        of = pairs.fold == fold
        assert np.count_nonzero(pairs.same[of]) == np.count_nonzero(~pairs.same[of]) == 4
        people.append(set(labels[pairs.first[of]]) | set(labels[pairs.second[of]]))
    assert sum(map(len, people)) == len(set.union(*people))
    assert np.array_equal(labels[pairs.first] == labels[pairs.second], pairs.same)
    assert len({frozenset(pair) for pair in zip(pairs.first, pairs.second, strict=True)}) == 24


def test_pairs_of_one_person_are_spread_over_people(crops) -> None:
    folder = ImageFolder(crops({"Ann": 12, "Bob": 2, "Cem": 2, "Dee": 2, "Eva": 2, "Fay": 2}, folder="uneven"))
    pairs, labels = draw_pairs(folder, folds=2, pairs_per_fold=3), folder.labels.numpy()
    owners = labels[pairs.first[pairs.same]]
    assert np.unique(owners, return_counts=True)[1].max() == 1


def test_the_seed_decides(folder: ImageFolder) -> None:
    one, again, other = (draw_pairs(folder, 2, 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.first, again.first) and np.array_equal(one.second, again.second)
    assert not np.array_equal(one.first, other.first)


@pytest.mark.parametrize("renamed", [None, "portrait, {}.png", "Ann_0000{}.png"])
def test_what_is_written_is_read(folder: ImageFolder, tmp_path: Path, renamed: str | None) -> None:
    if renamed is not None:
        for number, path in enumerate(sorted((folder.root / "Ann").iterdir()), start=1):
            path.rename(path.with_name(renamed.format(number)))
        folder = ImageFolder(folder.root)
    pairs = draw_pairs(folder, folds=2, pairs_per_fold=5)
    write_pairs(tmp_path / "pairs.txt", pairs, folder)
    assert (tmp_path / "pairs.txt").read_text().startswith("2\t5\n") == (renamed is None)
    found = resolve_pairs(read_pairs(tmp_path / "pairs.txt"), folder)
    for column in ("first", "second", "same", "fold"):
        assert np.array_equal(getattr(found, column), getattr(pairs, column))


def test_a_fold_is_a_number_in_every_line(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("a,b,same,fold\na/1.png,a/2.png,1,0\na/1.png,b/1.png,0,x\n")
    with pytest.raises(PairsError, match="line 3: expected 'path,path,flag,fold'"):
        read_pairs(tmp_path / "pairs.csv")


def test_what_cannot_be_drawn_is_refused(folder: ImageFolder, crops, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"one of 10 folds has 15 genuine and 0 impostor pairs, but 300"):
        draw_pairs(folder)
    with pytest.raises(PairsError, match="has no subfolders"):
        make_pairs(folder.root / "Ann", tmp_path / "pairs.txt")
    for settings in ({"folds": 1}, {"pairs_per_fold": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            draw_pairs(folder, **settings)


def test_the_command_writes_or_refuses_in_a_line(folder: ImageFolder, tmp_path: Path) -> None:
    output = tmp_path / "pairs.txt"
    arguments = ["pairs", str(folder.root), "-o", str(output), "--folds", "2"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and not output.exists()
    (line,) = refused.stderr.strip().splitlines()
    assert "use fewer pairs per fold" in line
    written = CliRunner().invoke(main, [*arguments, "--pairs-per-fold", "4"])
    assert written.exit_code == 0, written.output
    assert written.stdout.endswith("16 pairs in 2 folds\n")
