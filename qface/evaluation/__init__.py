"""How well a model verifies faces."""

from qface.evaluation.embedding import Embedder, TorchEmbedder, as_embedder, embed
from qface.evaluation.evaluate import EvaluationResult, evaluate
from qface.evaluation.match_thresholds import MatchThresholds, match_thresholds, thresholds_of, write_thresholds
from qface.evaluation.template_verification import TemplateProtocol, TemplateResult, evaluate_templates
from qface.evaluation.thresholds import OperatingThresholds, PairingThreshold, operating_thresholds
from qface.evaluation.verification import (
    FPRS,
    OperatingPoint,
    Rates,
    count_pairs,
    rates_at,
    ten_fold_accuracy,
    tpr_at_fpr,
    tpr_at_fpr_of_scores,
)

__all__ = [
    "FPRS",
    "Embedder",
    "EvaluationResult",
    "MatchThresholds",
    "OperatingPoint",
    "OperatingThresholds",
    "PairingThreshold",
    "Rates",
    "TemplateProtocol",
    "TemplateResult",
    "TorchEmbedder",
    "as_embedder",
    "count_pairs",
    "embed",
    "evaluate",
    "evaluate_templates",
    "match_thresholds",
    "operating_thresholds",
    "rates_at",
    "ten_fold_accuracy",
    "thresholds_of",
    "tpr_at_fpr",
    "tpr_at_fpr_of_scores",
    "write_thresholds",
]
