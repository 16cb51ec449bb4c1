"""Losses between embeddings of student and teacher: the ranking of pairs (EKD), or the distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.distillation.distill_config import Surrogate
from qface.errors import ConfigError, TrainingError

__all__ = ["CosineEmbeddingLoss", "EKDLoss", "MSEEmbeddingLoss"]

# All six from Tencent/TFace, recognition/tasks/ekd, the code of Huang et al. (CVPR 2022).
_INVERSE_FPR = (10, 10**2, 10**3, 10**4, 10**5, 10**6)
_THRESHOLD_MOMENTUM = 0.01
_TEMPERATURE = 0.01
_HARDEST_NEGATIVES = 2000
_POSITIVE_WEIGHT = 0.02
_NEGATIVE_WEIGHT = 0.01
_EXPONENT_LIMIT = 50.0


class EKDLoss(nn.Module):
    """Evaluation-oriented knowledge distillation: the student shall rank the pairs of a batch as the teacher
    does.

    Huang et al., CVPR 2022, as in Tencent/TFace ``recognition/tasks/ekd``. All pairs i < j of a batch are
    compared by the cosine of their embeddings; pairs of one identity are positive. For the false positive
    rates 10^-1 .. 10^-6 the thresholds t_k of student and teacher are moving averages (weight 0.01 on the new
    value, no gradient) over the ``floor(n 10^-k)``-th highest of the batch's n negatives. With
    ``surrogate="sigmoid"`` a pair with cosine s has the soft rank ``c(s) = sum_k sigmoid((s - t_k) / 0.01)``;
    with ``"linear"`` it is ``c(s) = sum_k (s - t_k)``, the difference of equation 1 of Ef-QuantFace summed
    over its thresholds. The loss is ``0.02 mean_positives (c_S - c_T)^2 + 0.01 mean_negatives (c_S -
    c_T)^2``, the latter over the 2,000 negatives that score highest for the student.

    Known weaknesses. At batch 64 (about 2,000 negatives) the thresholds for 10^-4 and below are all the
    single hardest negative. A pair further than about 8 x 0.01 from every threshold has no gradient with the
    sigmoid. Thresholds that start at zero, as the original's do, have come only 87.5 % of their way after one
    epoch of LFW. An embedding loss beside EKD covers the first two; the third is repaired here unless
    ``reference`` is set.

    Args:
        surrogate: ``"sigmoid"`` or ``"linear"``, see above.
        reference: do as the original: thresholds start at zero instead of at the first batch's values, and a
            batch without positives (or negatives) yields NaN instead of leaving that term out.

    Raises:
        ConfigError: the surrogate is neither of the two.
    """

    student_thresholds: Tensor
    teacher_thresholds: Tensor
    started: Tensor

    def __init__(self, surrogate: Surrogate = "sigmoid", reference: bool = False) -> None:
        super().__init__()
        if surrogate not in ("sigmoid", "linear"):
            raise ConfigError(f"the surrogate of EKD is 'sigmoid' or 'linear', not {surrogate!r}")
        self.surrogate = surrogate
        self.reference = reference
        self.register_buffer("student_thresholds", torch.zeros(len(_INVERSE_FPR)))
        self.register_buffer("teacher_thresholds", torch.zeros(len(_INVERSE_FPR)))
        self.register_buffer("started", torch.tensor(reference))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        """Update the thresholds by this batch and return its loss, a scalar.

        Args:
            student: embeddings [N, D], normalized or not; the gradient flows into them.
            teacher: embeddings [N, E] of the same images; E may differ from D.
            labels: identities [N]; without them every pair counts as negative.
        """
        pairs = _Pairs.of(student, teacher.detach(), labels)
        negatives, order = pairs.student[~pairs.positive].sort(descending=True)
        self._update_thresholds(negatives.detach(), pairs.teacher[~pairs.positive])

        difference = self._rank(pairs.student, self.student_thresholds)
        difference = difference - self._rank(pairs.teacher, self.teacher_thresholds)
        hardest = difference[~pairs.positive][order[:_HARDEST_NEGATIVES]]
        positive, negative = self._mean_square(difference[pairs.positive]), self._mean_square(hardest)
        return _POSITIVE_WEIGHT * positive + _NEGATIVE_WEIGHT * negative

    def _update_thresholds(self, student: Tensor, teacher: Tensor) -> None:
        """Follow the cosines [n] of a batch's negatives, of which the student's are in descending order."""
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
    """All pairs i < j of a batch: their cosines [P] for both networks, and whether each shares a label."""

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
    """Mean squared difference of the normalized embeddings, over batch and dimensions: the loss of QuantFace.

    Raises:
        TrainingError: student and teacher have embeddings of different length.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of ``student`` [N, D] against ``teacher`` [N, D], a scalar."""
        _require_same_size(student, teacher)
        return F.mse_loss(F.normalize(student), F.normalize(teacher.detach()))


class CosineEmbeddingLoss(nn.Module):
    """Mean of ``1 - cosine`` between the two embeddings of each image; D / 2 times :class:`MSEEmbeddingLoss`.

    Raises:
        TrainingError: student and teacher have embeddings of different length.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of ``student`` [N, D] against ``teacher`` [N, D], a scalar."""
        _require_same_size(student, teacher)
        return 1 - F.cosine_similarity(student, teacher.detach()).mean()


def _require_same_size(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"an embedding loss needs embeddings of one shape, not {list(student.shape)} of the student and "
            f"{list(teacher.shape)} of the teacher: use EKD alone"
        )
