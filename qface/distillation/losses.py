"""Losses between the embeddings of student and teacher: ranking of pairs (EKD) and distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.checks import check_choice
from qface.distillation.distill_config import Surrogate
from qface.errors import TrainingError

__all__ = ["CosineEmbeddingLoss", "EKDLoss", "MSEEmbeddingLoss", "SimilarityEmbeddingLoss"]

# All six from Tencent/TFace, recognition/tasks/ekd, the code of Huang et al. (CVPR 2022).
_INVERSE_FPR = (10, 10**2, 10**3, 10**4, 10**5, 10**6)
_THRESHOLD_MOMENTUM = 0.01
_TEMPERATURE = 0.01
_HARDEST_NEGATIVES = 2000
_POSITIVE_WEIGHT = 0.02
_NEGATIVE_WEIGHT = 0.01
_EXPONENT_LIMIT = 50.0


class EKDLoss(nn.Module):
    """Evaluation-oriented knowledge distillation (EKD): match the teacher's ranking of pairs.

    Huang et al., CVPR 2022, as in Tencent/TFace ``recognition/tasks/ekd``. Each pair i < j of a batch has the cosine of
    its embeddings as its score; pairs of one identity are positive. For each FPR 10^-k, k = 1..6, student and teacher
    have a threshold t_k: the ``floor(n 10^-k)``-th highest of the batch's n negative scores, as a moving average with
    weight 0.01 on the new value and without gradient. The soft rank of a score s is ``c(s) = sum_k sigmoid((s - t_k) /
    0.01)``, or ``c(s) = sum_k (s - t_k)`` with the linear surrogate (equation 1 of Ef-QuantFace, summed over the
    thresholds). The loss is ``0.02 mean (c_S - c_T)^2`` over positives plus ``0.01 mean (c_S - c_T)^2`` over the 2,000
    negatives with the highest student scores.

    Known weaknesses:

    - At batch size 64 (about 2,000 negatives), all thresholds for FPR <= 10^-4 are the single hardest negative.
    - With the sigmoid, a pair further than about 0.08 from every threshold has no gradient.
    - Thresholds that start at 0 cover only 87.5 % of their way in one epoch of LFW. Here they start at the values of
      the first batch, unless ``reference`` is set.

    An embedding loss compensates for the first two.

    Args:
        surrogate: ``"sigmoid"`` or ``"linear"``.
        reference: follow the authors' code: thresholds start at 0, and a batch without positives (or without negatives)
            yields NaN instead of a loss without that term.

    Raises:
        ConfigError: ``surrogate`` has another value.
    """

    student_thresholds: Tensor
    teacher_thresholds: Tensor
    started: Tensor

    def __init__(self, surrogate: Surrogate = "sigmoid", reference: bool = False) -> None:
        super().__init__()
        check_choice(Surrogate, surrogate=surrogate)
        self.surrogate = surrogate
        self.reference = reference
        self.register_buffer("student_thresholds", torch.zeros(len(_INVERSE_FPR)))
        self.register_buffer("teacher_thresholds", torch.zeros(len(_INVERSE_FPR)))
        self.register_buffer("started", torch.tensor(reference))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Update the thresholds with a batch, in training mode, and return its loss, a scalar.

        Args:
            student: embeddings [N, D], normalized or not.
            teacher: embeddings [N, E] of the same images, which get no gradient; E may differ from D.
            labels: identities, int64 [N]; None means that all pairs are negative.
        """
        pairs = _Pairs.of(student, teacher.detach(), labels)
        negatives, order = pairs.student[~pairs.positive].sort(descending=True)
        if self.training:
            self._update_thresholds(negatives.detach(), pairs.teacher[~pairs.positive])

        difference = self._rank(pairs.student, self.student_thresholds)
        difference = difference - self._rank(pairs.teacher, self.teacher_thresholds)
        hardest = difference[~pairs.positive][order[:_HARDEST_NEGATIVES]]
        positive, negative = self._mean_square(difference[pairs.positive]), self._mean_square(hardest)
        return _POSITIVE_WEIGHT * positive + _NEGATIVE_WEIGHT * negative

    def _update_thresholds(self, student: Tensor, teacher: Tensor) -> None:
        """Update the thresholds with the negative scores [n] of a batch; ``student`` is in descending order."""
        count = len(student)
        if count == 0:
            return
        ranks = [count // inverse for inverse in _INVERSE_FPR]
        weight = _THRESHOLD_MOMENTUM if self.started else 1.0
        self.student_thresholds = self._moved(self.student_thresholds, student[ranks], weight)
        self.teacher_thresholds = self._moved(
            self.teacher_thresholds, teacher.sort(descending=True).values[ranks], weight
        )
        self.started = torch.ones_like(self.started)

    @staticmethod
    def _moved(average: Tensor, new: Tensor, weight: float) -> Tensor:
        return weight * new.to(average.dtype) + (1 - weight) * average

    def _rank(self, cosines: Tensor, thresholds: Tensor) -> Tensor:
        distance = cosines[:, None] - thresholds
        if self.surrogate == "sigmoid":
            distance = (distance / _TEMPERATURE).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).sigmoid()
        return distance.sum(1)

    def _mean_square(self, difference: Tensor) -> Tensor:
        count = len(difference) if self.reference else max(len(difference), 1)
        return difference.square().sum() / count


class _Pairs(NamedTuple):
    """Cosines [P] of all pairs i < j of a batch for both networks, and True for each positive pair."""

    student: Tensor
    teacher: Tensor
    positive: Tensor

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor, labels: Tensor | None) -> _Pairs:
        first, second = torch.triu_indices(len(student), len(student), offset=1, device=student.device)
        identity = torch.arange(len(student), device=student.device) if labels is None else labels
        return cls(
            _cosines(student)[first, second],
            _cosines(teacher)[first, second],
            identity[first] == identity[second],
        )


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    return unit @ unit.T


class MSEEmbeddingLoss(nn.Module):
    """Mean squared error between normalized embeddings, the loss of QuantFace."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar: the mean over batch and dimensions.

        Args:
            student: embeddings [N, D].
            teacher: embeddings [N, D] of the same images, which get no gradient.

        Raises:
            TrainingError: the shapes differ.
        """
        _require_same_shape(student, teacher)
        return F.mse_loss(F.normalize(student), F.normalize(teacher.detach()))


class CosineEmbeddingLoss(nn.Module):
    """Mean cosine distance between two embeddings per image, D / 2 times :class:`MSEEmbeddingLoss`."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean of ``1 - cosine``, a scalar.

        Args:
            student: embeddings [N, D].
            teacher: embeddings [N, D] of the same images, which get no gradient.

        Raises:
            TrainingError: the shapes differ.
        """
        _require_same_shape(student, teacher)
        return 1 - F.cosine_similarity(student, teacher.detach()).mean()


class SimilarityEmbeddingLoss(nn.Module):
    """Mean squared change of an embedding's cosines with other faces.

    For unit embeddings s of the student and t of the teacher, and the teacher's embedding b of any other face, the
    expected squared change of the cosine is ``(s - t)' M (s - t)`` with the second moment ``M = E[b b']``. The loss is
    its mean times D / 2, which for ``M = I / D`` is :class:`CosineEmbeddingLoss`. An error counts more in directions in
    which faces differ, since only there it changes scores.

    M is the mean of ``b b'`` over all batches so far, and over D images with ``I / D`` before the first one.

    Args:
        dim: embedding dimension D.
    """

    second_moment: Tensor
    num_images: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("second_moment", torch.eye(dim) / dim)
        self.register_buffer("num_images", torch.tensor(float(dim)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Update the second moment with a batch, in training mode, and return its loss, a scalar.

        Args:
            student: embeddings [N, D].
            teacher: embeddings [N, D] of the same images, which get no gradient.

        Raises:
            TrainingError: the shapes differ.
        """
        _require_same_shape(student, teacher)
        expected = F.normalize(teacher.detach())
        if self.training:
            self._update(expected)
        change = F.normalize(student) - expected
        return 0.5 * student.shape[1] * ((change @ self.second_moment) * change).sum(1).mean()

    def _update(self, teacher: Tensor) -> None:
        total = self.num_images + len(teacher)
        self.second_moment = (self.second_moment * self.num_images + teacher.T @ teacher) / total
        self.num_images = total


def _require_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"an embedding loss needs embeddings of one shape, got {list(student.shape)} (student) and "
            f"{list(teacher.shape)} (teacher): use EKD alone"
        )
