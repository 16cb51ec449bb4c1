"""Knowledge distillation: train a small or quantized student to embed faces as its teacher does."""

from qface.distillation.distill_config import (
    LR_PER_RMS_DISTANCE,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from qface.distillation.heads import ArcFaceHead
from qface.distillation.losses import CosineEmbeddingLoss, EKDLoss, MSEEmbeddingLoss, SimilarityEmbeddingLoss
from qface.distillation.trainer import check_run, distill

__all__ = [
    "LR_PER_RMS_DISTANCE",
    "ArcFaceHead",
    "CosineEmbeddingLoss",
    "DistillConfig",
    "EKDLoss",
    "LossConfig",
    "MSEEmbeddingLoss",
    "OptimizerConfig",
    "ScheduleConfig",
    "SimilarityEmbeddingLoss",
    "check_run",
    "distill",
]
