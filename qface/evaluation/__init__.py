"""How well a model verifies faces."""

from qface.evaluation.embedding import Embedder, TorchEmbedder, as_embedder, embed
from qface.evaluation.evaluate import EvaluationResult, evaluate
from qface.evaluation.verification import (
    FPRS,
    OperatingPoint,
    count_pairs,
    ten_fold_accuracy,
    tpr_at_fpr,
)

__all__ = [
    "FPRS",
    "Embedder",
    "EvaluationResult",
    "OperatingPoint",
    "TorchEmbedder",
    "as_embedder",
    "count_pairs",
    "embed",
    "evaluate",
    "ten_fold_accuracy",
    "tpr_at_fpr",
]
