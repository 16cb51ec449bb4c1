"""Distillation: a small or quantized student learns to see faces as its teacher does."""

from qface.distillation.config import RATE_OF_DISTANCE, DistillConfig
from qface.distillation.heads import ArcFaceHead
from qface.distillation.losses import CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss
from qface.distillation.trainer import check_run, distill

__all__ = [
    "RATE_OF_DISTANCE",
    "ArcFaceHead",
    "CosineEmbeddingLoss",
    "DistillConfig",
    "EKDLoss",
    "MSEEmbeddingLoss",
    "check_run",
    "distill",
]
