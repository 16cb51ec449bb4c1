"""Identification against its definitions, written out probe by probe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qface.data import TensorImages
from qface.errors import ConfigError, ImagesError
from qface.evaluation import embed, evaluate_identification
from qface.evaluation.identification import Protocol, probe_scores


class Pooled(nn.Module):
    """Embeds an image as the means of its 2x2 cells."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def people(several: int, single: int, noise: float = 0.5) -> TensorImages:
    """``several`` people with three images each and ``single`` with one."""
    labels = torch.cat([torch.arange(several).repeat_interleave(3), several + torch.arange(single)])
    generator = torch.Generator().manual_seed(0)
    faces = torch.rand(several + single, 3, 2, 2, generator=generator) * 2 - 1
    images = faces[labels] + noise * (torch.rand(len(labels), 3, 2, 2, generator=generator) * 2 - 1)
    return TensorImages(images.clamp(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3), labels)


@given(st.lists(st.integers(0, 6), min_size=6, max_size=30), st.integers(0, 99))
def test_one_image_of_each_person_with_several_is_enrolled(labels: list[int], seed: int) -> None:
    images_of = {person: labels.count(person) for person in labels}
    if sum(count > 1 for count in images_of.values()) < 2:
        with pytest.raises(ImagesError, match="two identities with two images"):
            Protocol.of(labels, seed)
        return
    protocol = Protocol.of(labels, seed)
    parts = (protocol.gallery, protocol.mated, protocol.non_mated)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    enrolled = [labels[image] for image in protocol.gallery]
    assert sorted(enrolled) == sorted(person for person, count in images_of.items() if count > 1)
    assert {labels[image] for image in protocol.mated} == set(enrolled)
    assert all(images_of[labels[image]] == 1 for image in protocol.non_mated)


def test_other_seeds_enroll_other_images() -> None:
    labels = np.repeat(np.arange(20), 3)
    assert np.array_equal(Protocol.of(labels, 1).gallery, Protocol.of(labels, 1).gallery)
    assert not np.array_equal(Protocol.of(labels, 1).gallery, Protocol.of(labels, 2).gallery)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_scores_and_ranks_are_those_of_each_probe(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 0, 1, 1, rng.integers(0, 9, 20)]
    rows = rng.integers(-2, 3, (len(labels), 3)).astype(np.float32)  # ties are many
    protocol = Protocol.of(labels, seed)
    found = probe_scores(rows, labels, protocol)
    for at, probe in enumerate(protocol.mated):
        scores = {labels[entry]: rows[entry] @ rows[probe] for entry in protocol.gallery}
        own = scores.pop(labels[probe])
        assert (found.mate[at], found.rank[at]) == (own, 1 + sum(other >= own for other in scores.values()))
    assert found.highest.tolist() == [
        max(rows[entry] @ rows[probe] for entry in protocol.gallery) for probe in protocol.non_mated
    ]


def test_rates_follow_their_definitions() -> None:
    source = people(40, 150, noise=0.9)
    result = evaluate_identification(Pooled(), source, seed=3, bootstrap=30)
    labels = source.labels.numpy()
    scores = probe_scores(embed(Pooled(), source), labels, Protocol.of(labels, 3))
    threshold = np.sort(scores.highest)[::-1][15]
    assert (result.rank_1, result.rank_5) == (np.mean(scores.rank == 1), np.mean(scores.rank <= 5))
    assert 0.2 < result.rank_1 < result.rank_5 < 1
    assert result.thresholds == {"1e-1": float(threshold), "1e-2": None, "1e-3": None}
    assert result.tpir_at_fpir["1e-1"] == pytest.approx(np.mean((scores.rank == 1) & (scores.mate > threshold)))
    assert result.tpir_at_fpir["1e-2"] is None and result.tpir_intervals["1e-2"] is None
    assert (result.enrolled, result.mated_probes, result.non_mated_probes) == (40, 80, 150)
    for interval, rate in (
        (result.rank_intervals["rank_1"], result.rank_1),
        (result.tpir_intervals["1e-1"], result.tpir_at_fpir["1e-1"]),
    ):
        assert interval.low < rate < interval.high
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_what_cannot_be_measured_is_refused() -> None:
    source = people(3, 0)
    assert evaluate_identification(Pooled(), source).tpir_at_fpir == dict.fromkeys(("1e-1", "1e-2", "1e-3"))
    with pytest.raises(ConfigError, match="seed"):
        evaluate_identification(Pooled(), source, seed=-1)
    with pytest.raises(ConfigError, match="bootstrap"):
        evaluate_identification(Pooled(), source, bootstrap=-1)
    with pytest.raises(ImagesError, match="labeled images"):
        evaluate_identification(Pooled(), source.images)


def test_the_command_prints_a_table_and_json(crops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qface.cli import main

    (tmp_path / "pooled_network.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = crops({"Ann": 3, "Bob": 2, "Cid": 1})
    arguments = ["identify", "pooled_network:make", "--images", str(folder), "--bootstrap", "3"]
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0, table.output
    assert "rank 1, closed set" in table.stdout
    record = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert (record["enrolled"], record["mated_probes"], record["non_mated_probes"]) == (2, 3, 1)
