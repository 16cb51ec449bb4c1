"""Evaluation of face verification and identification, with thresholds and confidence intervals."""

from qface.evaluation.bootstrap import (
    Interval,
    PairIntervals,
    TprDrop,
    bootstrap_eer,
    bootstrap_pairs,
    bootstrap_tpr,
    bootstrap_tpr_drop,
    bootstrap_tpr_of_scores,
)
from qface.evaluation.embedding import Embedder, TorchEmbedder, as_embedder, embed
from qface.evaluation.evaluate import EvaluationResult, ListedFigures, evaluate
from qface.evaluation.groups import GroupsResult, evaluate_groups
from qface.evaluation.identification import (
    FPIRS,
    IdentificationRates,
    IdentificationResult,
    evaluate_identification,
)
from qface.evaluation.match_thresholds import MatchThresholds, match_thresholds, thresholds_of, write_thresholds
from qface.evaluation.stress_evaluation import STRESS_FPRS, StressFigures, StressResult, evaluate_stress
from qface.evaluation.template_identification import GalleryFigures, TemplateIdentification
from qface.evaluation.template_verification import TemplateProtocol, TemplateResult, evaluate_templates
from qface.evaluation.thresholds import OperatingThresholds, PairingThreshold, operating_thresholds
from qface.evaluation.verification import (
    FPRS,
    OperatingPoint,
    Rates,
    count_pairs,
    equal_error_rate,
    equal_error_rate_of_scores,
    rates_at,
    ten_fold_accuracy,
    tpr_at_fpr,
    tpr_at_fpr_of_scores,
    unmeasured,
)

__all__ = [
    "FPIRS",
    "FPRS",
    "STRESS_FPRS",
    "Embedder",
    "EvaluationResult",
    "GalleryFigures",
    "GroupsResult",
    "IdentificationRates",
    "IdentificationResult",
    "Interval",
    "ListedFigures",
    "MatchThresholds",
    "OperatingPoint",
    "OperatingThresholds",
    "PairIntervals",
    "PairingThreshold",
    "Rates",
    "StressFigures",
    "StressResult",
    "TemplateIdentification",
    "TemplateProtocol",
    "TemplateResult",
    "TorchEmbedder",
    "TprDrop",
    "as_embedder",
    "bootstrap_eer",
    "bootstrap_pairs",
    "bootstrap_tpr",
    "bootstrap_tpr_drop",
    "bootstrap_tpr_of_scores",
    "count_pairs",
    "embed",
    "equal_error_rate",
    "equal_error_rate_of_scores",
    "evaluate",
    "evaluate_groups",
    "evaluate_identification",
    "evaluate_stress",
    "evaluate_templates",
    "match_thresholds",
    "operating_thresholds",
    "rates_at",
    "ten_fold_accuracy",
    "thresholds_of",
    "tpr_at_fpr",
    "tpr_at_fpr_of_scores",
    "unmeasured",
    "write_thresholds",
]
