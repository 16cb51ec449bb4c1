"""``--json``: every command prints one object, whose keys are those that docs/json.md lists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.demo import DemoReport, DemoRow
from tests.crops import write_crops
from tests.data.ijb import SmallIjb

PAGE = Path(qface.__file__).parents[1] / "docs" / "json.md"

NET = "tests.networks:tiny_face_net"
FACES = "--images crops --people first-half"
LINES = (
    f"allocate-bits {NET} {FACES} --num-images 4 --budget-mb 0.1 -o bits.json",
    f"quantize {NET} --config bits.json -o new.safetensors",
    f"calibrate new.safetensors {FACES} -o calibrated.safetensors",
    f"distill calibrated.safetensors --teacher {NET} {FACES} --batch-size 8 --run-dir run -o student.safetensors",
    "export student.safetensors -o student.onnx",
    "verify student.safetensors student.onnx --images crops",
    f"thresholds student.onnx --teacher {NET} --images crops --fpr 0.2 --write student.onnx",
    "selftest student.onnx",
    "inspect student.safetensors",
    "inspect student.onnx",
    "bench student.onnx --runs 1",
    "size student.onnx",
    "pairs crops --folds 2 --pairs-per-fold 4 -o pairs.txt",
    "evaluate student.safetensors --images crops --pairs pairs.txt --bootstrap 2",
    f"evaluate student.safetensors --images crops --groups groups.csv --reference {NET} --at-fpr 0.1 --bootstrap 2",
    f"evaluate student.safetensors --images crops --stress --reference {NET} --bootstrap 2",
    "identify student.safetensors --images crops --bootstrap 2",
    "ijb student.safetensors --data IJBC --bootstrap 2",
    f"synthesize {NET} --num-images 2 --num-steps 1 --batch-size 2 -o made",
    "align IJBC/loose_crop --landmarks IJBC/meta/ijbc_name_5pts_score.txt -o aligned",
    f"sensitivity {NET} {FACES} --num-images 4",
    f"prune {NET} --ratio 0.5 -o pruned.safetensors",
    f"compress {NET} --images crops --bits 6 --max-drop 100 --stress dark --at-fpr 1e-1 --run-dir found -o small.onnx",
    f"compress {NET} --images crops --max-mb 1 --at-fpr 1e-1 --run-dir searched -o smaller.onnx",
    "report found --fpr 1e-1 --latency-runs 1 -o found.html",
    "plot size student.onnx -o size.svg",
    "tensorboard run -o events",
    "demo",
)


def demo_report(folder: Path, seed: int) -> DemoReport:
    """Stands for the training of a teacher, which takes a minute."""
    return DemoReport(10, 100, (DemoRow("teacher, float32", 0.9, {"1e-1": 0.8, "1e-2": None}, 1000, 0.5),))


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The output of each command with ``--json``, each time that it runs."""
    folder = tmp_path_factory.mktemp("json")
    write_crops(folder / "crops", dict.fromkeys(("Ann", "Bob", "Cid", "Dee", "Eve", "Fay"), 6))
    (folder / "groups.csv").write_text("Ann,x\nBob,x\nCid,y\nDee,y\n")
    SmallIjb(folder / "IJBC")
    outputs: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("qface.demo.run_demo", demo_report)
        for line in LINES:
            name, *arguments = shlex.split(line)
            result = CliRunner().invoke(main, [name, *arguments, "--json"])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            outputs.setdefault(_heading(line), []).append(result.stdout)
    return outputs


def _heading(line: str) -> str:
    """The section of the page on what ``line`` prints: of several that fit, the one with most options."""
    words = set(shlex.split(line))
    return max((name for name in documented() if words.issuperset(name.split())), key=len)


Key = tuple[str, ...]


def documented() -> dict[str, dict[Key, str]]:
    """Of each command the keys on the page, and their types."""
    first, *sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    row = re.compile(r"^\| `([^`]+)` \| ([^|]+?) \|", re.MULTILINE)
    common = {tuple(key.split(".")): kind for key, kind in row.findall(first)}
    return {
        section.partition("\n")[0]: common | {tuple(key.split(".")): kind for key, kind in row.findall(section)}
        for section in sections
    }


def keys(value: Any, at: Key = ()) -> Iterator[tuple[Key, Any]]:
    """All keys of a JSON value, with what they stand for; those of objects in a list after ``name[]``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*at, name), inner
            yield from keys(inner, (*at, name))
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, (*at[:-1], f"{at[-1]}[]"))


def matches(pattern: Key, key: Key) -> bool:
    """``{name}`` stands for any one key, ``*`` for all that is inside."""
    if pattern[-1] == "*":
        return len(key) >= len(pattern) and matches(pattern[:-1], key[: len(pattern) - 1])
    pairs = zip(pattern, key, strict=False)
    return len(pattern) == len(key) and all(p == k or re.fullmatch(r"\{\w+\}", p) for p, k in pairs)


def kind_of(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "list", dict: "object"}
    return "null" if value is None else kinds[type(value)]


def fits(kind: str, value: Any) -> bool:
    names = [name.split()[0] for name in kind.split(" or ")]
    return "any" in names or kind_of(value) in names or (kind_of(value) == "integer" and "number" in names)


def test_every_command_is_on_the_page() -> None:
    assert {name.split()[0] for name in documented()} == set(main.commands)


@pytest.mark.parametrize("name", sorted(documented()))
def test_the_page_lists_what_a_command_prints(name: str, printed: dict[str, list[str]]) -> None:
    page, seen = documented()[name], set[Key]()
    for output in printed[name]:
        (line,) = output.splitlines()
        record = json.loads(line)
        assert next(iter(record.items())) == ("schema_version", 1)
        for key, value in keys(record):
            patterns = [pattern for pattern in page if matches(pattern, key)]
            assert patterns, f"{'.'.join(key)} is not on the page: {value!r:.100}"
            kind = page[patterns[0]]
            assert fits(kind, value), f"{'.'.join(key)} is no {kind}: {value!r:.100}"
            seen.update(patterns)
    # What is in an object that may be null is not printed where too few pairs leave it null.
    assert not {key for key in page.keys() - seen if "null" not in page.get(key[:-1], "")}, "never printed"


UNITS = {"seconds", "ms", "mb", "bytes"}


def test_a_key_with_a_unit_ends_in_it() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows
    for key, unit in rows:
        last = re.split(r"[._]", key.removesuffix("[]"))[-1]
        assert (last in UNITS) == (unit.strip() in {"s", "ms", "MB", "bytes"}), (key, unit)
