"""Verification and identification of templates against a slow, obvious implementation of the same rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qface
from qface.data import read_templates
from qface.errors import ConfigError, ExportError, ImagesError, PairsError, QFaceError
from qface.evaluation import Interval, tpr_at_fpr_of_scores
from qface.evaluation import template_verification as templates_module
from qface.files import alone_in
from qface.preprocessing import Preprocessing
from tests.data.ijb import SmallIjb
from tests.networks import tiny_face_net


def obvious_templates(
    written: SmallIjb, raw: dict[str, np.ndarray], protocol: str, weighted: bool
) -> dict[int, np.ndarray]:
    """The embedding of each template, by the rules of ArcFace's and Ef-QuantFace's texts."""
    joined = {}
    for template in {template for _, template, _, _ in written.rows}:
        by_media: dict[int, list[np.ndarray]] = {}
        for file, owner, media, score in written.rows:
            if owner == template:
                by_media.setdefault(media, []).append(raw[file] * (score if weighted else 1))
        if protocol == "arcface":
            vector = sum(np.mean(images, axis=0) for images in by_media.values())
        else:
            vector = np.mean([image for images in by_media.values() for image in images], axis=0)
        joined[template] = vector / np.linalg.norm(vector)
    return joined


def obvious_rank_1(written: SmallIjb, joined: dict[int, np.ndarray], gallery: str) -> float:
    """Fraction of probes whose subject's template is the most similar, of probes with their subject in the gallery."""
    enrolled, hits = written.lists[f"gallery_{gallery}"], []
    for probe, subject in written.lists["probe_mixed"].items():
        if subject in enrolled.values():
            hits.append(enrolled[max(enrolled, key=lambda each: joined[each] @ joined[probe])] == subject)
    return float(np.mean(hits))


def obvious_tpr(genuine: list[float], impostors: list[float], fpr: float) -> float:
    threshold = sorted(impostors, reverse=True)[int(len(impostors) * fpr)]
    return sum(score > threshold for score in genuine) / len(genuine)


def raw_embeddings(model: nn.Module, root: Path, flip: bool) -> dict[str, np.ndarray]:
    images = read_templates(root).images
    x = (images.read(range(len(images))).float() - 127.5) / 127.5
    with torch.no_grad():
        rows = model(x) + (model(x.flip(3)) if flip else 0)
    return {face.file: row.double().numpy() for face, row in zip(images.faces, rows, strict=True)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("protocol", ["paper", "arcface"])
def test_against_the_obvious(protocol, weighted: bool, flip: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(templates_module, "_IMAGES", 5)  # so that templates meet the ends of blocks
    monkeypatch.setattr(templates_module, "_PAIRS", 7)
    written = SmallIjb(tmp_path)
    model = tiny_face_net()
    result = qface.evaluate_templates(model, tmp_path, protocol, flip, weighted)
    joined = obvious_templates(written, raw_embeddings(model, tmp_path, flip), protocol, weighted)
    scores = {(a, b): float(joined[a] @ joined[b]) for a, b, _ in written.pairs}
    genuine = [scores[a, b] for a, b, same in written.pairs if same]
    impostors = [scores[a, b] for a, b, same in written.pairs if not same]
    assert (result.protocol, result.flip, result.detector_score) == (protocol, flip, weighted)
    assert (result.genuine_pairs, result.impostor_pairs) == (len(genuine), len(impostors))
    assert (result.images, result.templates) == (len(written.rows), 18)
    assert result.tpr_at_fpr["1e-1"] == obvious_tpr(genuine, impostors, 0.1)
    threshold = sorted(impostors, reverse=True)[int(len(impostors) * 0.1)]
    assert result.thresholds["1e-1"] == pytest.approx(threshold, abs=1e-6)
    assert result.tpr_at_fpr["1e-3"] is None  # of 135 impostors
    rates = [obvious_rank_1(written, joined, gallery) for gallery in ("G1", "G2")]
    assert [each.rates.rank_1 for each in result.identification.galleries.values()] == rates
    assert result.identification.mean.rank_1 == pytest.approx(np.mean(rates))


def test_intervals_resample_people(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    result = qface.evaluate_templates(tiny_face_net(), tmp_path, bootstrap=1)
    templates = read_templates(tmp_path)
    joined = obvious_templates(written, raw_embeddings(tiny_face_net(), tmp_path, False), "paper", False)
    people = dict(zip(templates.names, np.repeat(range(6), 3), strict=True))
    times = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6))
    scores: dict[int, list[float]] = {0: [], 1: []}
    for a, b, same in written.pairs:
        scores[same] += [float(joined[a] @ joined[b])] * (times[people[a]] * (1 if same else times[people[b]]))
    expected = pytest.approx(obvious_tpr(scores[1], scores[0], 0.1))
    assert (result.bootstrap, result.tpr_intervals["1e-1"]) == (1, Interval(expected, expected))
    assert result.tpr_intervals["1e-3"] is None
    assert result.identification.galleries["G2"].rates.rank_intervals["rank_1"] is not None
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_without_lists_of_galleries_there_is_no_identification(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    for file in (tmp_path / "meta").glob("*_1N_*"):
        file.unlink()
    result = qface.evaluate_templates(tiny_face_net(), tmp_path)
    assert (result.identification, result.tpr_intervals) == (None, {})
    assert "no 1:N identification: the folder has no files *_1N_*.csv" in " ".join(str(result).split())


def test_wrong_lists_are_refused_before_embedding(tmp_path: Path) -> None:
    written, model = SmallIjb(tmp_path), Counting()
    written.write("ijbc_1N_gallery_G1.csv", "nothing\n")
    with pytest.raises(ImagesError, match="must have a header"):
        qface.evaluate_templates(model, tmp_path)
    with pytest.raises(ConfigError, match="bootstrap must be an integer >= 0"):
        qface.evaluate_templates(model, tmp_path, bootstrap=-1)
    assert model.images == 0


def test_protocols_differ_on_videos(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    model = tiny_face_net()
    thresholds = [qface.evaluate_templates(model, tmp_path, name).thresholds["1e-1"] for name in ("paper", "arcface")]
    assert thresholds[0] != thresholds[1]


class Counting:
    """An embedder that counts images and may be stopped."""

    preprocessing = Preprocessing()

    def __init__(self, stop_after: int | None = None, sign: float = 1.0, stop: BaseException | None = None) -> None:
        self.network, self.images, self.stop_after, self.sign = tiny_face_net(), 0, stop_after, sign
        self.stop = stop or KeyboardInterrupt()

    def __call__(self, batch: Tensor) -> Tensor:
        if self.stop_after is not None and self.images >= self.stop_after:
            raise self.stop
        self.images += len(batch)
        with torch.no_grad():
            return self.sign * self.network(batch)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    whole = Counting()
    expected = qface.evaluate_templates(whole, tmp_path / "ijb", batch_size=4)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        qface.evaluate_templates(Counting(stop_after=20), tmp_path / "ijb", run_dir=run, batch_size=4)
    with (run / "embeddings.f32").open("ab") as file:
        file.write(b"part of a row")
    rest = Counting()
    resumed = qface.evaluate_templates(rest, tmp_path / "ijb", run_dir=run, batch_size=4)
    assert rest.images < whole.images - 10
    assert resumed.tpr_at_fpr == expected.tpr_at_fpr
    assert resumed.thresholds == pytest.approx(expected.thresholds, abs=1e-6)
    finished = Counting()
    qface.evaluate_templates(finished, tmp_path / "ijb", "arcface", run_dir=run, batch_size=4)
    assert finished.images == 1 + 3  # one that tells the dimensions, and those that tell models apart


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    run = tmp_path / "run"
    qface.evaluate_templates(Counting(), tmp_path / "ijb", run_dir=run)
    with pytest.raises(ConfigError, match="of another model"):
        qface.evaluate_templates(Counting(sign=-1.0), tmp_path / "ijb", run_dir=run)
    with pytest.raises(ConfigError, match="other images or settings"):
        qface.evaluate_templates(Counting(), tmp_path / "ijb", flip=True, run_dir=run)


def test_a_model_that_gives_other_lengths_is_another(tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    qface.evaluate_templates(Counting(), tmp_path / "ijb", run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="of another model"):
        qface.evaluate_templates(Counting(sign=0.5), tmp_path / "ijb", run_dir=tmp_path / "run")


def test_a_broken_model_spoils_no_folder(tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    run = tmp_path / "run"
    with pytest.raises(QFaceError, match="not finite"):
        qface.evaluate_templates(Counting(sign=float("nan")), tmp_path / "ijb", run_dir=run)
    expected = qface.evaluate_templates(Counting(), tmp_path / "ijb")
    assert qface.evaluate_templates(Counting(), tmp_path / "ijb", run_dir=run).thresholds == expected.thresholds


@pytest.mark.parametrize("error", [ValueError("odd input"), FileNotFoundError(2, "No such file", "weights.bin")])
@pytest.mark.parametrize("stop_after", [0, 20])
def test_what_a_model_raises_passes(stop_after: int, error: Exception, tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    model = Counting(stop_after, stop=error)
    with pytest.raises(type(error)) as raised:
        qface.evaluate_templates(model, tmp_path / "ijb", run_dir=tmp_path / "run", batch_size=4)
    assert raised.value is error


@pytest.mark.parametrize("spoilt", ["run", "run/embeddings.json", "run/embeddings.f32"])
def test_a_folder_that_cannot_hold_embeddings_is_named(spoilt: str, tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    run = tmp_path / "run"
    if spoilt == "run":
        run.write_text("a file")
    else:
        (tmp_path / spoilt).mkdir(parents=True)
    with pytest.raises(ExportError, match="run cannot hold embeddings"):
        qface.evaluate_templates(Counting(), tmp_path / "ijb", run_dir=run)


def test_scores_of_the_detector_must_be_there(tmp_path: Path) -> None:
    written = SmallIjb(tmp_path)
    listed = (tmp_path / "meta" / "ijbc_name_5pts_score.txt").read_text()
    written.write("ijbc_name_5pts_score.txt", "".join(line.rpartition(" ")[0] + "\n" for line in listed.splitlines()))
    model = Counting()
    with pytest.raises(ConfigError, match="have no detector score"):
        qface.evaluate_templates(model, tmp_path, detector_score=True)
    assert model.images == 0
    assert qface.evaluate_templates(model, tmp_path).images == len(written.rows)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    SmallIjb(tmp_path / "ijb")
    run = tmp_path / "run"
    run.mkdir()
    with alone_in(run), pytest.raises(ConfigError, match="another run is writing to"):
        qface.evaluate_templates(Counting(), tmp_path / "ijb", run_dir=run)


def test_no_such_protocol(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="protocol must be one of 'paper', 'arcface', got 'median'"):
        qface.evaluate_templates(tiny_face_net(), tmp_path, "median")


def test_a_model_without_embeddings_is_named(tmp_path: Path) -> None:
    SmallIjb(tmp_path)
    with pytest.raises(QFaceError, match="the embedding of image 0 is zero or not finite"):
        qface.evaluate_templates(Counting(sign=0.0), tmp_path)


def test_rates_of_listed_scores() -> None:
    scores = np.arange(200, dtype=np.float32) / 200
    same = np.arange(200) % 2 == 1
    point = tpr_at_fpr_of_scores(scores, same, ["1e-1"])["1e-1"]
    assert point.threshold == pytest.approx(178 / 200)  # ten impostors lie above it
    assert point.tpr == 11 / 100
    with pytest.raises(PairsError, match="both genuine and impostor pairs"):
        tpr_at_fpr_of_scores(scores, np.ones(200, bool))
    with pytest.raises(QFaceError, match="not finite"):
        tpr_at_fpr_of_scores(scores * np.nan, same)
