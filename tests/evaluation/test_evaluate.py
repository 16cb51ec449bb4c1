import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qface.data import ImageFolder, TensorImages
from qface.errors import CheckpointError, ConfigError, ImagesError, PairsError, QFaceError
from qface.evaluation import (
    FPRS,
    bootstrap_eer,
    bootstrap_pairs,
    bootstrap_tpr,
    embed,
    equal_error_rate,
    equal_error_rate_of_scores,
    evaluate,
    ten_fold_accuracy,
    tpr_at_fpr,
    tpr_at_fpr_of_scores,
)
from qface.evaluation.verification import single_fold_accuracy
from qface.models import load

PAIRS = "2\t1\nAnn\t1\t2\nAnn\t2\tBob\t1\nBob\t1\t2\nBob\t2\tCem\t1\n"
PEOPLE = {"Ann": 3, "Bob": 3, "Cem": 3}


class Pooled(nn.Module):
    """Embeds an image as the means of its 4x4 cells, projected at random."""

    def __init__(self, dimensions=16, noise=0.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        projection = torch.eye(48)[:, :dimensions] + noise * torch.randn(48, dimensions, generator=generator)
        self.projection = nn.Parameter(projection)

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.projection


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    return tmp_path / "pairs.txt"


def test_figures_are_those_of_the_parts(crops, pairs):
    folder = ImageFolder(crops({**PEOPLE, **{f"P{k}": 2 for k in range(10)}}))
    result = evaluate(Pooled(), folder, pairs=pairs)
    probes = embed(Pooled(), folder)
    points = tpr_at_fpr(probes, folder.labels.numpy())
    assert result.tpr_at_fpr == {fpr: point.tpr for fpr, point in points.items()}
    assert result.thresholds == {fpr: point.threshold for fpr, point in points.items()}
    assert (result.images, result.identities, result.runtime) == (29, 13, "torch cpu")
    assert (result.genuine_pairs, result.impostor_pairs) == (19, 387)
    listed = np.array([(0, 1), (1, 3), (3, 4), (4, 6)])
    cosines = (probes[listed[:, 0]] * probes[listed[:, 1]]).sum(1)
    expected = ten_fold_accuracy(cosines, [1, 0, 1, 0], [0, 0, 1, 1])
    assert (result.accuracy, result.accuracy_std) == pytest.approx(expected)
    assert (result.pairs, result.pairs_dropped) == (4, 0)
    assert result.seconds > 0


def test_intervals_and_listed_rates_are_those_of_the_parts(crops, tmp_path):
    folder = ImageFolder(crops({f"P{k}": 2 for k in range(14)}))
    listed = [(a, b) for a in range(28) for b in range(a)]
    names = [path.relative_to(folder.root) for path in folder.paths]
    same = [a // 2 == b // 2 for a, b in listed]
    lines = [f"{names[a]},{names[b]},{int(kind)}" for (a, b), kind in zip(listed, same, strict=True)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    result = evaluate(Pooled(), folder, pairs=tmp_path / "pairs.csv", bootstrap=20)
    probes, labels = embed(Pooled(), folder), folder.labels.numpy()
    first, second = np.array(listed).T
    cosines = (probes[first] * probes[second]).sum(1)
    assert result.eer == pytest.approx(equal_error_rate(probes, labels))
    assert result.eer_interval == bootstrap_eer(result.eer, probes, labels, replicates=20)
    assert result.eer_interval.low < result.eer < result.eer_interval.high
    assert result.tpr_intervals == bootstrap_tpr(probes, labels, replicates=20)
    assert result.listed.eer == pytest.approx(equal_error_rate_of_scores(cosines, same))
    points = tpr_at_fpr_of_scores(cosines, same)
    assert result.listed.tpr_at_fpr == {fpr: point.tpr for fpr, point in points.items()}
    people = (labels[first], labels[second])
    expected = bootstrap_pairs(cosines, same, np.zeros(len(listed), int), people, replicates=20)
    assert result.listed.tpr_intervals == expected.tpr_at_fpr
    assert (result.listed.accuracy_interval, result.listed.resampled) == (expected.accuracy, "people")
    assert result.listed.eer_interval == expected.eer
    assert result.listed.tpr_at_fpr["1e-1"] is not None
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    with pytest.raises(ConfigError, match="bootstrap"):
        evaluate(Pooled(), folder, bootstrap=-1)


class Stopping(Pooled):
    """Stops after so many images, as Ctrl-C would."""

    def __init__(self, last=None):
        super().__init__()
        self.images, self.last = 0, last

    def forward(self, images):
        if self.last is not None and self.images >= self.last:
            raise KeyboardInterrupt
        self.images += len(images)
        return super().forward(images)


def test_a_stopped_evaluation_goes_on(crops, pairs, tmp_path):
    folder = crops({**PEOPLE, **{f"P{k}": 2 for k in range(10)}})
    options = {"pairs": pairs, "batch_size": 4, "gallery": Pooled(noise=0.1)}
    expected = evaluate(Pooled(), folder, **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopping(last=24), folder, **options, run_dir=tmp_path / "run")
    rest = Stopping()
    resumed = evaluate(rest, folder, **options, run_dir=tmp_path / "run")
    assert rest.images < 20
    for result in (resumed, evaluate(Pooled(), folder, **options, run_dir=tmp_path / "run")):
        assert replace(result, seconds=0) == replace(expected, seconds=0)
    with pytest.raises(ConfigError, match="another model"):
        evaluate(Pooled(noise=1.0), folder, **options, run_dir=tmp_path / "run")
    replaced, other = sorted(folder.rglob("*.png"))[4:6]
    replaced.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="other images"):
        evaluate(Pooled(), folder, **options, run_dir=tmp_path / "run")


def test_a_loader_cannot_go_on(tmp_path):
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    loader = [(images, torch.arange(8) // 2)]
    with pytest.raises((ConfigError, ImagesError)):
        evaluate(Pooled(), loader, run_dir=tmp_path / "run")


RANK = """
import os, sys
from pathlib import Path
from dataclasses import replace
from qface.data import ImageFolder
from qface.evaluation import evaluate
from tests.evaluation.test_evaluate import Pooled
folder, pairs, output = sys.argv[1:]
results = [evaluate(Pooled(), folder, pairs=pairs, run_dir=run_dir) for run_dir in (None, output + "/run")]
found = {str(replace(result, seconds=0)) for result in results}
Path(output, "rank" + os.environ["RANK"]).write_text("\\n".join(found))
"""


def test_two_ranks_measure_what_one_measures(crops, pairs, tmp_path):
    pytest.importorskip("lightning_fabric")
    folder = crops({**PEOPLE, **{f"P{k}": 2 for k in range(10)}})  # 29 images: one rank has one more
    (tmp_path / "rank.py").write_text(RANK)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *ranks, tmp_path / "rank.py", folder, pairs, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = str(replace(evaluate(Pooled(), folder, pairs=pairs), seconds=0))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [expected, expected]


def test_without_pairs_there_is_no_accuracy(crops):
    result = evaluate(Pooled(), crops(PEOPLE))
    assert (result.accuracy, result.accuracy_std, result.pairs, result.pairs_dropped) == (None, None, 0, 0)


def test_result_is_plain_json(crops, pairs):
    record = evaluate(Pooled(), crops(PEOPLE), pairs=pairs).to_dict()
    assert json.loads(json.dumps(record)) == record
    assert tuple(record["tpr_at_fpr"]) == FPRS


def test_people_are_selected_and_pairs_dropped(crops, pairs, tmp_path):
    pairs.write_text(PAIRS.replace("2\t1", "3\t1", 1).replace("Cem\t1", "Ann\t1") + "Cem\t1\t2\nCem\t1\tAnn\t1\n")
    (tmp_path / "people.txt").write_text("Ann\nBob\n")
    result = evaluate(Pooled(), crops(PEOPLE), pairs=pairs, identities=tmp_path / "people.txt")
    assert (result.images, result.identities, result.pairs, result.pairs_dropped) == (6, 2, 4, 2)


def test_gallery_of_the_same_model_doubles_the_pairs_and_keeps_the_accuracy(crops, pairs):
    folder = crops({**PEOPLE, **{f"P{k}": 2 for k in range(10)}})
    alone, against = evaluate(Pooled(), folder, pairs), evaluate(Pooled(), folder, pairs, gallery=Pooled())
    assert (against.genuine_pairs, against.impostor_pairs) == (2 * alone.genuine_pairs, 2 * alone.impostor_pairs)
    assert against.accuracy == pytest.approx(alone.accuracy)


def test_first_image_of_a_pair_is_the_probe(crops, pairs):
    folder = ImageFolder(crops(PEOPLE))
    probe, gallery = Pooled(noise=1.0, seed=1), Pooled()
    listed = np.array([(0, 1), (1, 3), (3, 4), (4, 6)])
    cosines = (embed(probe, folder)[listed[:, 0]] * embed(gallery, folder)[listed[:, 1]]).sum(1)
    expected = ten_fold_accuracy(cosines, [1, 0, 1, 0], [0, 0, 1, 1])
    result = evaluate(probe, folder, pairs, gallery=gallery)
    assert (result.accuracy, result.accuracy_std) == pytest.approx(expected)


def test_labeled_tensors_can_be_evaluated():
    images = TensorImages(2 * torch.rand(6, 3, 8, 8) - 1, torch.tensor([7, 7, 9, 9, 9, 2]))
    result = evaluate(Pooled(), images)
    assert (result.identities, result.genuine_pairs, result.impostor_pairs) == (3, 4, 11)


def test_images_without_labels_are_refused(crops):
    flat = crops({"Ann": 2}) / "Ann"
    for images in (flat, 2 * torch.rand(4, 3, 8, 8) - 1, [2 * torch.rand(4, 3, 8, 8) - 1]):
        with pytest.raises(ImagesError, match="labeled images"):
            evaluate(Pooled(), images)


def test_pairs_need_a_folder(pairs):
    images = TensorImages(2 * torch.rand(3, 3, 8, 8) - 1, torch.tensor([0, 0, 1]))
    with pytest.raises(PairsError, match="pass the folder"):
        evaluate(Pooled(), images, pairs=pairs)


def test_a_verification_bin_brings_its_pairs(crops, pairs, tmp_path):
    folder = ImageFolder(crops(PEOPLE))
    listed = [(0, 1), (1, 3), (3, 4), (4, 6), (0, 2), (2, 8)] * 5
    encoded = [folder.paths[index].read_bytes() for pair in listed for index in pair]
    same = [True, False] * 15
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((encoded, same)))
    result = evaluate(Pooled(), tmp_path / "lfw.bin")
    assert (result.images, result.identities, result.pairs) == (60, 0, 30)
    assert (result.genuine_pairs, result.impostor_pairs) == (15, 15)
    assert result.tpr_at_fpr == dict.fromkeys(FPRS)
    probes = embed(Pooled(), folder)
    cosines = np.array([probes[a] @ probes[b] for a, b in listed])
    assert (result.accuracy, result.accuracy_std) == pytest.approx(
        ten_fold_accuracy(cosines, same, np.repeat(np.arange(10), 3))
    )
    assert result.eer is None
    assert result.listed.eer == pytest.approx(equal_error_rate_of_scores(cosines, same))
    assert result.listed.tpr_at_fpr == dict.fromkeys(FPRS)  # of 15 impostors
    assert evaluate(Pooled(), tmp_path / "lfw.bin", bootstrap=5).listed.resampled == "pairs"
    with pytest.raises(PairsError, match="contains its own"):
        evaluate(Pooled(), tmp_path / "lfw.bin", pairs=pairs)


def test_errors_come_before_any_embedding(crops, pairs, tmp_path):
    def model(images):
        raise AssertionError("embedded")

    model.preprocessing = None
    with pytest.raises(ImagesError, match="at least two identities"):
        evaluate(model, crops({"Ann": 2}))
    with pytest.raises(PairsError, match="not in"):
        evaluate(model, crops({"Ann": 2, "Bob": 1}, folder="other"), pairs=pairs)
    view1, people = tmp_path / "view1.txt", tmp_path / "people.txt"
    people.write_text("Ann\nBob\n")
    view1.write_text("2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nAnn\t1\t2\nAnn\t1\tCem\t1\n")
    with pytest.raises(PairsError, match="but two are needed"):
        evaluate(model, crops({"Ann": 2, "Bob": 1, "Cem": 1}, folder="few"), pairs=view1, identities=people)
    with pytest.raises(CheckpointError, match="there is no file"):
        evaluate(model, crops({"Ann": 2, "Bob": 1}, folder="two"), gallery="none.onnx")


def test_models_of_different_embeddings_do_not_compare(crops):
    with pytest.raises(QFaceError, match="16 dimensions and the gallery 8"):
        evaluate(Pooled(), crops(PEOPLE), gallery=Pooled(8))


@pytest.mark.faces
def test_pretrained_network_knows_faces(faces, tmp_path):
    root = faces / "data" / "lfw"
    several = sorted(path.name for path in root.iterdir() if len(list(path.iterdir())) >= 4)[:40]
    (tmp_path / "people.txt").write_text("\n".join(several))
    path = faces / "weights" / "mobilefacenet_112x96.safetensors"
    result = evaluate(path, root, identities=tmp_path / "people.txt")
    assert result.identities == 40
    assert result.tpr_at_fpr["1e-3"] > 0.9
    against = evaluate(load(path), root, identities=tmp_path / "people.txt", gallery=path)
    assert against.tpr_at_fpr["1e-3"] == pytest.approx(result.tpr_at_fpr["1e-3"], abs=0.01)


def test_pairs_of_one_fold_are_judged_on_themselves_and_that_is_said(crops, tmp_path, caplog):
    folder = ImageFolder(crops(PEOPLE))
    rows = ["Ann/Ann_0001,Ann/Ann_0002,1", "Bob/Bob_0001,Bob/Bob_0003,1", "Ann/Ann_0001,Bob/Bob_0001,0"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    result = evaluate(Pooled(), folder, pairs=tmp_path / "pairs.csv")
    rows = embed(Pooled(), folder)
    scores = [float(rows[i] @ rows[j]) for i, j in ((0, 1), (3, 5), (0, 3))]
    assert result.accuracy == single_fold_accuracy(scores, [True, True, False])
    assert result.accuracy_std is None and result.pairs == 3
    assert any("one fold" in message for message in caplog.messages)
    (tmp_path / "pairs.csv").write_text("Ann/Ann_0001,Ann/Ann_0002,1")
    with pytest.raises(PairsError, match="both genuine and impostor pairs"):
        evaluate(Pooled(), folder, pairs=tmp_path / "pairs.csv")


def test_the_accuracy_of_one_fold_is_that_of_its_best_threshold():
    assert single_fold_accuracy([0.9, 0.8, 0.3, 0.1], [True, True, False, False]) == 1.0
    assert single_fold_accuracy([0.9, 0.2, 0.3, 0.1], [True, True, False, False]) == 0.75
