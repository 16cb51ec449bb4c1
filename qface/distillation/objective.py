"""Weighted sum of the configured losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qface.distillation.distill_config import EmbeddingLossName, LossConfig
from qface.distillation.feature_taps import FeatureLoss, FeaturePairs
from qface.distillation.heads import ArcFaceHead
from qface.distillation.losses import CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss, SimilarityEmbeddingLoss
from qface.errors import TrainingError

__all__ = ["Objective"]

_EMBEDDING_LOSSES: dict[EmbeddingLossName, Callable[[int], nn.Module]] = {
    "cosine": lambda dim: CosineEmbeddingLoss(),
    "mse": lambda dim: MSEEmbeddingLoss(),
    "similarity": SimilarityEmbeddingLoss,
}
"""The function that makes each loss for an embedding dimension."""


class Objective(nn.Module):
    """The weighted terms of the loss, with their trainable parameters and buffers.

    Args:
        config: the terms and their weights.
        student_dim: embedding dimension of the student.
        teacher_dim: embedding dimension of the teacher.
        num_identities: number of classes of the class head, or None if unknown.
        features: residual sums of some images to fit the feature loss on; empty for no feature loss.
        seed: seed of the initial weights of the class head.

    Raises:
        TrainingError: an embedding loss with different embedding dimensions, or a class head without identities.
    """

    def __init__(
        self,
        config: LossConfig,
        student_dim: int,
        teacher_dim: int,
        num_identities: int | None,
        features: FeaturePairs = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        if config.uses_embedding_loss and student_dim != teacher_dim:
            raise TrainingError(
                f"the {config.embedding_loss} loss cannot compare embeddings of {student_dim} values (student) "
                f"and {teacher_dim} (teacher): set embedding_loss=None to distill by EKD alone"
            )
        if config.uses_ekd:
            self.ekd = EKDLoss(config.ekd_surrogate, config.reference_ekd)
        if config.embedding_loss is not None:
            self.embedding = _EMBEDDING_LOSSES[config.embedding_loss](teacher_dim)
        if config.class_head:
            self.head = self._class_head(student_dim, num_identities, seed)
        if features:
            self.feature_loss = FeatureLoss(features)

    def weighted_feature_loss(self, features: FeaturePairs) -> Tensor:
        """Return the weighted feature loss of each image, [N, 1]."""
        loss: Tensor = self.config.feature_loss_weight * self.feature_loss(features)
        return loss

    def _class_head(self, embedding_dim: int, num_identities: int | None, seed: int) -> ArcFaceHead:
        if num_identities is None:
            raise TrainingError(
                "the class head needs to know all identities in advance, which a loader does not tell: give a folder "
                "with a sub-folder per person, or a tensor with labels (TensorImages), or set class_head=False"
            )
        generator = torch.Generator().manual_seed(seed)
        return ArcFaceHead(embedding_dim, num_identities, self.config.margin, self.config.scale, generator)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the weighted terms by name, each a scalar; the loss is their sum.

        Args:
            student: embeddings [N, D].
            teacher: embeddings [N, E] of the same images.
            labels: identities, int64 [N], or None if unknown.
        """
        terms: dict[str, Tensor] = {}
        if self.config.uses_ekd:
            terms["ekd"] = self.config.ekd_weight * self.ekd(student, teacher, labels)
        if self.config.uses_embedding_loss:
            terms["embedding"] = self.config.embedding_weight * self.embedding(student, teacher)
        if self.config.class_head:
            terms["class_head"] = self.config.class_head_weight * self.head(student, labels)
        return terms
