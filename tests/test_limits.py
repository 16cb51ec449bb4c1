"""Nothing that a file says can crash, fill or hang the process."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qface
from qface.data.pairs import read_pairs
from qface.data.verification_bin import VerificationBin
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import ConfigError, LimitError
from qface.limits import Allowance, Limits, check, elements_of, limits, parse_json
from tests import attacks
from tests.benchmarks.scripts import script

MOST_SECONDS, MOST_MEMORY = 60.0, 2**30  # machines are slow and shared; what is attacked takes minutes


def read_bin(path: Path) -> None:
    VerificationBin(path).read([0])


def embed(path: Path) -> None:
    embedder = OnnxEmbedder(path, threads=1)
    embedder(torch.zeros(1, 3, *embedder.preprocessing.size))


def align(path: Path) -> None:
    landmarks = path / "landmarks.txt"
    landmarks.write_text("large.png 6000 6000 7000 6000 6500 6500 6100 7000 6900 7000\n")
    report = qface.align(path, path.parent / "crops", landmarks)
    assert report.unreadable == ("large.png",)


ATTACKS: list[tuple[Callable[[Path], None], attacks.Attack]] = [
    *((read_bin, each) for each in attacks.PAIR_SETS),
    *((qface.load, each) for each in (*attacks.CHECKPOINTS, *attacks.SAVED_GRAPHS, *attacks.ONNX_FILES)),
    *((embed, each) for each in attacks.ONNX_FILES),
    (align, attacks.large_photo),
]


@pytest.mark.parametrize(("reader", "attack"), ATTACKS, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_file_that_asks_for_too_much(reader: Callable[[Path], Any], attack: attacks.Attack, tmp_path: Path) -> None:
    for module in ("onnxruntime", "onnx.reference", "torch._dynamo", "qface.models.onnx_import"):
        importlib.import_module(module)  # before the fork
    path = attack(tmp_path)
    gc.collect()
    outcome = script("harness.confinement").confined(lambda: reader(path), MOST_SECONDS)
    assert outcome.kind in ("read", "refused"), outcome.message
    assert "\n" not in outcome.message
    assert outcome.memory < MOST_MEMORY


def test_the_environment_raises_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match=r"the file needs 300 levels of nesting.*QFACE_LIMITS=depth=NUMBER"):
        check("depth", 300, "the file")
    monkeypatch.setenv("QFACE_LIMITS", "depth=500, bytes=4e9")
    check("depth", 300, "the file")
    assert limits() == Limits(depth=500, bytes=4 * 10**9)


@pytest.mark.parametrize("text", ["depth", "depth=many", "depth=0", "height=3", "depth=inf", "depth=-5"])
def test_a_variable_that_names_no_limit_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFACE_LIMITS", text)
    with pytest.raises(ConfigError, match="QFACE_LIMITS has the invalid entry"):
        limits()


def test_a_list_is_read_line_by_line_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a.png,b.png,1\n" * 30)
    assert len(read_pairs(path)) == 30
    monkeypatch.setenv("QFACE_LIMITS", "objects=20")
    with pytest.raises(LimitError, match=r"pairs\.csv, with one for each line, needs 21 objects"):
        read_pairs(path)
    path.write_text(f"a.png,{'b' * 30}.png,1\n")
    with pytest.raises(LimitError, match=r"pairs\.csv, line 1, with one for each character, needs 21 objects"):
        read_pairs(path)


def test_what_is_no_number_exceeds_every_limit() -> None:
    allowance = Allowance("the file")
    with pytest.raises(LimitError):
        allowance.spend(float("nan"))


@given(st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_read_as_it_is(value: Any) -> None:
    import json

    assert parse_json(json.dumps(value), "it") == value


def test_brackets_in_strings_are_no_nesting() -> None:
    assert parse_json('["' + "[" * 1000 + '\\"]"]', "it") == ["[" * 1000 + '"]']


def test_shapes() -> None:
    assert elements_of((2, 3, 4), "it") == 24 and elements_of((), "it") == 1
    for shape in [(-1,), (2.0,), (2**63,), ("2",)]:
        with pytest.raises(ValueError, match="not an integer >= 0"):
            elements_of(shape, "it")
    with pytest.raises(LimitError, match="65 dimensions"):
        elements_of((1,) * 65, "it")
