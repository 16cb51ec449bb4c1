from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.distillation.batch_sampler import PairSampler, flips

LABELS = st.lists(st.integers(0, 20), min_size=2, max_size=120)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, known=st.booleans(), size=st.integers(2, 64), seed=st.integers(0, 9), data=st.data())
def test_an_epoch_has_full_batches_without_repeats(
    labels: list[int], known: bool, size: int, seed: int, data: st.DataObject
) -> None:
    size = min(size, len(labels))
    sampler = PairSampler(len(labels), torch.tensor(labels) if known else None, size, seed)
    batches = list(sampler.epoch(data.draw(st.integers(0, 3))))
    assert len(batches) == sampler.steps_per_epoch == len(labels) // size
    assert all(len(batch) == len(set(batch)) == size for batch in batches)
    assert all(0 <= index < len(labels) for batch in batches for index in batch)


@settings(max_examples=40, deadline=None)
@given(labels=LABELS, size=st.integers(4, 64))
def test_every_batch_holds_positives_wherever_an_identity_has_two_images(labels: list[int], size: int) -> None:
    sampler = PairSampler(len(labels), torch.tensor(labels), min(size, len(labels)), seed=0)
    for batch in sampler.epoch(0):
        repeated = max(Counter(labels[index] for index in batch).values()) > 1
        assert repeated or not sampler.has_positives


def test_a_batch_of_64_is_32_random_images_and_8_identities_of_4() -> None:
    labels = torch.arange(400) // 5
    for batch in PairSampler(400, labels, 64, seed=3).epoch(0):
        groups = [labels[batch[start : start + 4]].tolist() for start in range(0, 32, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == 8


def test_small_identities_give_what_they_have_and_single_images_are_random() -> None:
    labels = torch.tensor([0, 0, 1, 1, *range(2, 66)])
    (batch,) = PairSampler(68, labels, 64, seed=0).epoch(0)
    assert set(batch[:4]) == {0, 1, 2, 3}
    assert not PairSampler(3, torch.arange(3), 2, seed=0).has_positives


def test_unlabeled_images_all_come_once_an_epoch() -> None:
    batches = list(PairSampler(60, None, 10, seed=0).epoch(0))
    assert sorted(index for batch in batches for index in batch) == list(range(60))


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    labels = torch.arange(64) // 4

    def epoch(seed: int, number: int) -> list[list[int]]:
        return list(PairSampler(64, labels, 16, seed).epoch(number))

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 0)
    assert epoch(0, 1) != epoch(1, 1)


def test_flips_depend_on_seed_and_step_alone() -> None:
    assert torch.equal(flips(64, 0, 5), flips(64, 0, 5))
    assert not torch.equal(flips(64, 0, 5), flips(64, 0, 6))
    assert 400 < int(flips(1000, 0, 0).sum()) < 600
