"""Runs over many pairs: they go on where they were stopped, and several processes find what one finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qface.errors import ConfigError
from qface.evaluation import pair_scores, score_counts, score_ranking, tpr_at_fpr
from qface.evaluation.pair_scores import PairScores
from qface.files import alone_in

ROOT = Path(__file__).parents[2]
FPRS = ("1e-1", "1e-3", "1e-4")
TWO_RANKS = """
import os, sys
from pathlib import Path
import numpy as np
from qface.evaluation import tpr_at_fpr
faces = np.load(sys.argv[1])
points = tpr_at_fpr(faces["embeddings"], faces["labels"], ("1e-1", "1e-3", "1e-4"), run_dir=sys.argv[2], device="cpu")
Path(sys.argv[2], "rank" + os.environ["RANK"]).write_text(repr(points))
"""


class StoppedError(Exception):
    pass


def faces(images: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, images // 5, images)
    embeddings = rng.standard_normal((images // 5, 16))[labels] + 2 * rng.standard_normal((images, 16))
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_scores, "_TILE_SIZE", 128)
    monkeypatch.setattr(score_ranking, "_SAVED_EVERY", 0)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("stop", [1, 7, 15, 18])
def test_a_stopped_run_goes_on(sampled: bool, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_counts, "_LARGE", 1 if sampled else 2**25)
    embeddings, labels = faces()
    expected = tpr_at_fpr(embeddings, labels, FPRS)
    seen: list[Any] = []
    of = PairScores.of

    def stopping(self: PairScores, *tile: Any) -> Any:
        seen.append(tile)
        if len(seen) == stop:
            raise StoppedError
        return of(self, *tile)

    monkeypatch.setattr(PairScores, "of", stopping)
    try:
        tpr_at_fpr(embeddings, labels, FPRS, run_dir=tmp_path)
    except StoppedError:
        assert len(seen) == stop
    assert tpr_at_fpr(embeddings, labels, FPRS, run_dir=tmp_path) == expected
    passes = 1 if sampled else 2
    assert len(seen) == passes * 15 + (stop <= passes * 15)
    assert tpr_at_fpr(embeddings, labels, FPRS, run_dir=tmp_path) == expected
    assert len(seen) == passes * 15 + (stop <= passes * 15)


def test_a_sample_that_misleads_costs_a_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = faces()
    expected = tpr_at_fpr(embeddings, labels, FPRS)
    monkeypatch.setattr(score_counts, "_LARGE", 1)
    for value in (-0.5, 0.0, 0.7):
        sample = np.full(1000, value, np.float32)
        monkeypatch.setattr(PairScores, "sample", lambda *_, sample=sample: sample)
        assert tpr_at_fpr(embeddings, labels, FPRS) == expected


def test_counts_of_other_faces_are_refused(tmp_path: Path) -> None:
    embeddings, labels = faces()
    tpr_at_fpr(embeddings, labels, FPRS, run_dir=tmp_path)
    changed = embeddings.copy()
    changed[-1] = embeddings[0]
    for other in ((changed, labels, FPRS), (embeddings, labels[::-1], FPRS), (embeddings, labels, FPRS[1:])):
        with pytest.raises(ConfigError, match="other embeddings or rates: choose another folder"):
            tpr_at_fpr(*other, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="other embeddings or rates"):
        tpr_at_fpr(embeddings, labels, FPRS, gallery=embeddings, run_dir=tmp_path)


def test_damaged_counts_are_refused(tmp_path: Path) -> None:
    tpr_at_fpr(*faces(), FPRS, run_dir=tmp_path)
    (file,) = tmp_path.glob("*/counts.npz")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="is damaged: delete it"):
        tpr_at_fpr(*faces(), FPRS, run_dir=tmp_path)


def test_embeddings_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    embeddings, labels = faces()
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    assert tpr_at_fpr(mapped, labels, FPRS) == tpr_at_fpr(embeddings, labels, FPRS)


def test_two_ranks_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning_fabric")
    monkeypatch.setattr(pair_scores, "_TILE_SIZE", 2048)
    embeddings, labels = faces(5000)
    np.savez(tmp_path / "faces.npz", embeddings=embeddings, labels=labels)
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *ranks, tmp_path / "two_ranks.py", tmp_path / "faces.npz", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = repr(tpr_at_fpr(embeddings, labels, FPRS))
    assert [(tmp_path / "run" / f"rank{rank}").read_text() for rank in (0, 1)] == [expected, expected]
    assert len(list((tmp_path / "run").glob("scores-?-of-2/counts.npz"))) == 2


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    embeddings, labels = faces()
    (tmp_path / "scores-0-of-1").mkdir()
    with alone_in(tmp_path / "scores-0-of-1"), pytest.raises(ConfigError, match="another run is writing"):
        tpr_at_fpr(embeddings, labels, FPRS, run_dir=tmp_path)


def test_a_gpu_finds_what_the_cpu_finds() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    embeddings, labels = faces()
    found, expected = tpr_at_fpr(embeddings, labels, FPRS), tpr_at_fpr(embeddings, labels, FPRS, device="cpu")
    for fpr, point in expected.items():
        assert found[fpr].threshold == pytest.approx(point.threshold, abs=1e-6)
        assert found[fpr].tpr == pytest.approx(point.tpr, abs=1e-3)
