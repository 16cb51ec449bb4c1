"""Distillation: a small or quantized student learns to see faces as its teacher does."""

from qface.distillation.config import FEW_BITS, DistillConfig
from qface.distillation.heads import ArcFaceHead
from qface.distillation.losses import CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss
from qface.distillation.trainer import check_run, default_config, distill

__all__ = [
    "FEW_BITS",
    "ArcFaceHead",
    "CosineEmbeddingLoss",
    "DistillConfig",
    "EKDLoss",
    "MSEEmbeddingLoss",
    "check_run",
    "default_config",
    "distill",
]
