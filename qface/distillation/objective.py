"""The sum of losses that a configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qface.distillation.distill_config import DistillConfig
from qface.distillation.feature_taps import FeatureLoss, FeaturePairs
from qface.distillation.heads import ArcFaceHead
from qface.distillation.losses import CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss
from qface.errors import TrainingError

__all__ = ["Objective"]

_EMBEDDING_LOSSES = {"cosine": CosineEmbeddingLoss, "mse": MSEEmbeddingLoss}


class Objective(nn.Module):
    """The weighted losses of ``config``, with everything about them that is learned or remembered.

    Args:
        config: which losses, and their weights.
        student_size: length of the student's embedding.
        teacher_size: length of the teacher's.
        num_identities: for the class head, or None where they are unknown.
        features: residual sums of some images, if they are to be compared.

    Raises:
        TrainingError: an embedding loss with embeddings of different size, or a class head without
            identities.
    """

    def __init__(
        self,
        config: DistillConfig,
        student_size: int,
        teacher_size: int,
        num_identities: int | None,
        features: FeaturePairs = (),
    ) -> None:
        super().__init__()
        self.config = config
        if config.uses_embedding_loss and student_size != teacher_size:
            raise TrainingError(
                f"the {config.embedding_loss} loss cannot compare embeddings of {student_size} values (student) "
                f"and {teacher_size} (teacher): set embedding_loss=None to distill by EKD alone"
            )
        if config.uses_ekd:
            self.ekd = EKDLoss(config.ekd_surrogate, config.reference_ekd)
        if config.embedding_loss is not None:
            self.embedding = _EMBEDDING_LOSSES[config.embedding_loss]()
        if config.class_head:
            self.head = self._class_head(student_size, num_identities)
        if features:
            self.feature_loss = FeatureLoss(features)

    def weighted_feature_loss(self, features: FeaturePairs) -> Tensor:
        """The weighted loss of the residual sums of n images, for each of them, [n, 1]."""
        loss: Tensor = self.config.feature_loss_weight * self.feature_loss(features)
        return loss

    def _class_head(self, embedding_size: int, num_identities: int | None) -> ArcFaceHead:
        if num_identities is None:
            raise TrainingError(
                "the class head needs to know all identities in advance, which a loader does not tell: give a folder "
                "with a sub-folder per person, or a tensor with labels (TensorImages), or set class_head=False"
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        return ArcFaceHead(embedding_size, num_identities, self.config.margin, self.config.scale, generator)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The weighted terms by name, each a scalar; they add up to the loss.

        Args:
            student: embeddings [N, D].
            teacher: embeddings [N, E] of the same images.
            labels: identities [N], int64, or None where they are unknown.
        """
        terms: dict[str, Tensor] = {}
        if self.config.uses_ekd:
            terms["ekd"] = self.config.ekd_weight * self.ekd(student, teacher, labels)
        if self.config.uses_embedding_loss:
            terms["embedding"] = self.config.embedding_weight * self.embedding(student, teacher)
        if self.config.class_head:
            terms["class_head"] = self.config.class_head_weight * self.head(student, labels)
        return terms
