from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qface.distillation import ArcFaceHead, CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss, SimilarityEmbeddingLoss
from qface.errors import ConfigError, TrainingError

Array = np.ndarray


class PlainEKD:
    """The loss of design notes section 3, one pair and one threshold at a time, in numpy."""

    def __init__(self, surrogate: str, reference: bool) -> None:
        self.surrogate = surrogate
        self.reference = reference
        self.thresholds: list[list[float]] | None = [[0.0] * 6, [0.0] * 6] if reference else None

    def __call__(self, student: Array, teacher: Array, labels: list[int]) -> float:
        pairs = [
            (cosine(student[i], student[j]), cosine(teacher[i], teacher[j]), labels[i] == labels[j])
            for i in range(len(labels))
            for j in range(i + 1, len(labels))
        ]
        negatives = sorted((pair for pair in pairs if not pair[2]), reverse=True)
        if negatives:
            new = [
                [
                    sorted((pair[network] for pair in negatives), reverse=True)[len(negatives) // 10**k]
                    for k in range(1, 7)
                ]
                for network in (0, 1)
            ]
            if self.thresholds is None:
                self.thresholds = new
            else:
                self.thresholds = [
                    [0.01 * n + 0.99 * o for n, o in zip(*both, strict=True)]
                    for both in zip(new, self.thresholds, strict=True)
                ]
        positive = self.mean_square([pair for pair in pairs if pair[2]])
        return 0.02 * positive + 0.01 * self.mean_square(negatives[:2000])

    def mean_square(self, pairs: list[tuple[float, float, bool]]) -> float:
        if not pairs:
            return math.nan if self.reference else 0.0
        return sum((self.rank(s, 0) - self.rank(t, 1)) ** 2 for s, t, _ in pairs) / len(pairs)

    def rank(self, score: float, network: int) -> float:
        thresholds = [0.0] * 6 if self.thresholds is None else self.thresholds[network]
        if self.surrogate == "linear":
            return sum(score - t for t in thresholds)
        return sum(1 / (1 + math.exp(min(max(-(score - t) / 0.01, -50), 50))) for t in thresholds)


def cosine(a: Array, b: Array) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=14),
    sizes=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    surrogate=st.sampled_from(["sigmoid", "linear"]),
    reference=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_ekd_equals_a_plain_loop_over_several_batches(
    labels: list[int],
    sizes: tuple[int, int],
    surrogate: Literal["sigmoid", "linear"],
    reference: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss, plain = EKDLoss(surrogate, reference).double(), PlainEKD(surrogate, reference)
    for _ in range(3):
        student, teacher = (torch.randn(len(labels), n, generator=generator, dtype=torch.float64) for n in sizes)
        expected = plain(student.numpy(), teacher.numpy(), labels)
        actual = loss(student, teacher, torch.tensor(labels)).item()
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("surrogate", ["sigmoid", "linear"])
def test_ekd_equals_a_plain_loop_beyond_2000_negatives(surrogate: Literal["sigmoid", "linear"]) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(72, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = [index // 4 for index in range(72)]
    expected = PlainEKD(surrogate, False)(student.numpy(), teacher.numpy(), labels)
    actual = EKDLoss(surrogate).double()(student, teacher, torch.tensor(labels)).item()
    assert actual == pytest.approx(expected, abs=1e-6)


def test_reference_thresholds_start_at_zero_and_repaired_ones_at_the_first_batch() -> None:
    student, teacher = torch.eye(4) + 1, torch.eye(4) + 2
    repaired, reference = EKDLoss(), EKDLoss(reference=True)
    repaired(student, teacher), reference(student, teacher)
    score = F.cosine_similarity(student[0], student[1], dim=0)
    torch.testing.assert_close(repaired.student_thresholds, score.expand(6))
    torch.testing.assert_close(reference.student_thresholds, 0.01 * score.expand(6))
    assert not torch.equal(repaired.student_thresholds, repaired.teacher_thresholds)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], None])
def test_a_batch_without_positives_counts_only_negatives_unless_as_the_reference(labels: list[int] | None) -> None:
    student, teacher = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.eye(4)
    given_labels = None if labels is None else torch.tensor(labels)
    assert EKDLoss()(student, teacher, given_labels).item() > 0
    assert math.isnan(EKDLoss(reference=True)(student, teacher, given_labels).item())


def test_a_batch_of_one_person_leaves_the_thresholds_alone() -> None:
    loss = EKDLoss()
    assert loss(torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4, dtype=torch.long)).isfinite()
    assert not loss.started


def test_a_single_image_has_no_pairs_and_a_zero_gradient() -> None:
    student = torch.randn(1, 8, requires_grad=True)
    EKDLoss()(student, torch.randn(1, 8)).backward()
    assert torch.equal(student.grad, torch.zeros(1, 8))


@pytest.mark.parametrize("surrogate", ["sigmoid", "linear"])
def test_the_gradient_of_ekd_is_that_of_finite_differences(surrogate: Literal["sigmoid", "linear"]) -> None:
    # The two networks nearly agree, so pairs lie close to the thresholds, where the sigmoid has a slope.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    student = (teacher + 0.01 * torch.randn(6, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = EKDLoss(surrogate).double()
    loss(student, teacher, labels)
    loss.eval()  # so that thresholds do not follow the embeddings

    def of(embeddings: Tensor) -> Tensor:
        return loss(embeddings, teacher, labels)

    (gradient,) = torch.autograd.grad(of(student), student)
    assert gradient.abs().max() > 1e-4
    assert torch.autograd.gradcheck(of, (student,))


def test_ekd_is_zero_for_the_teacher_itself_at_any_size_and_scale() -> None:
    teacher = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    longer = torch.cat([3 * teacher, torch.zeros(8, 2)], 1)
    assert EKDLoss()(longer, teacher, torch.arange(8) // 2).item() == pytest.approx(0, abs=1e-6)


def test_ekd_refuses_an_unknown_surrogate() -> None:
    with pytest.raises(ConfigError, match="surrogate must be one of 'sigmoid', 'linear'"):
        EKDLoss("cubic")  # type: ignore[arg-type]


def test_embedding_losses_equal_plain_loops_and_let_gradients_through() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    rows = list(zip(student.detach().numpy(), teacher.numpy(), strict=True))
    squares = [(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2 for a, b in rows]
    assert MSEEmbeddingLoss()(student, teacher).item() == pytest.approx(np.mean(squares), abs=1e-9)
    loss = CosineEmbeddingLoss()(student, teacher)
    assert loss.item() == pytest.approx(np.mean([1 - cosine(a, b) for a, b in rows]), abs=1e-9)
    loss.backward()
    assert student.grad.abs().sum() > 0


def test_the_similarity_loss_is_the_squared_change_of_cosines_with_the_faces_so_far() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = SimilarityEmbeddingLoss(4).double()
    faces = [torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in (3, 4)]
    for batch in faces:
        loss(batch + 1, batch)
    loss.eval()  # so that the two batches stay the faces so far
    student, teacher = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    others = torch.cat([torch.eye(4, dtype=torch.float64), *faces]).numpy()  # the identity's rows are the prior
    rows = zip(student.numpy(), teacher.numpy(), strict=True)
    changes = [(cosine(a, other) - cosine(b, other)) ** 2 for a, b in rows for other in others]
    assert loss(student, teacher).item() == pytest.approx(4 / 2 * np.mean(changes), abs=1e-9)
    assert loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-9)


def test_the_similarity_loss_is_the_cosine_distance_before_it_knows_faces() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 6, generator=generator) for _ in range(2))
    found = SimilarityEmbeddingLoss(6).eval()(student, teacher)
    assert found.item() == pytest.approx(CosineEmbeddingLoss()(student, teacher).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [MSEEmbeddingLoss(), CosineEmbeddingLoss(), SimilarityEmbeddingLoss(4)])
def test_embedding_losses_refuse_another_size(loss: torch.nn.Module) -> None:
    with pytest.raises(TrainingError, match=r"\[2, 3\].*\[2, 4\].*EKD"):
        loss(torch.randn(2, 3), torch.randn(2, 4))


def test_arcface_equals_a_plain_loop_on_both_sides_of_pi() -> None:
    head = ArcFaceHead(2, 3, margin=0.4, scale=8.0).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]]))
    embeddings = torch.tensor([[1.0, 0.2], [-2.0, 0.01], [0.3, -4.0]], dtype=torch.float64, requires_grad=True)
    labels = [0, 0, 1]
    expected = []
    for embedding, label in zip(embeddings.detach().numpy(), labels, strict=True):
        logits = [8 * cosine(embedding, weight) for weight in head.weight.detach().numpy()]
        theta = math.acos(logits[label] / 8)
        beyond = theta + 0.4 >= math.pi
        logits[label] = 8 * (math.cos(theta) - 0.4 * math.sin(0.4) if beyond else math.cos(theta + 0.4))
        expected.append(math.log(sum(math.exp(value) for value in logits)) - logits[label])
    loss = head(embeddings, torch.tensor(labels))
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-9)
    loss.backward()
    assert embeddings.grad.isfinite().all()


def test_arcface_has_a_finite_gradient_at_its_own_center() -> None:
    head = ArcFaceHead(4, 2)
    embeddings = head.weight.detach().clone().requires_grad_()
    head(embeddings, torch.tensor([0, 1])).backward()
    assert embeddings.grad.isfinite().all()
