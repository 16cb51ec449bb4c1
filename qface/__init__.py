"""Makes face-recognition networks small and fast without losing what they know.

One verb a stage, each working alone: ``load``, ``quantize``, ``calibrate``, ``distill``, ``export``, ``evaluate``,
``save``, and ``verify``, which proves that a file computes what was trained. ``sensitivity`` says what each layer loses
at each number of bits, ``allocate_bits`` chooses bits for a budget, and ``operating_thresholds`` the cosines to accept.
"""

from qface._version import __version__
from qface.data.crops import AlignmentReport, align
from qface.deployment import SizeReport, export, measure_size, verify
from qface.deployment.mixed_precision import allocate_bits
from qface.distillation import DistillConfig, distill
from qface.errors import QFaceError
from qface.evaluation import (
    EvaluationResult,
    OperatingThresholds,
    TemplateResult,
    evaluate,
    evaluate_templates,
    operating_thresholds,
)
from qface.models import load, save
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.pruning import Budget, PruningConfig, prune
from qface.quantization import LayerBits, QuantizationConfig, QuantizationPlan, calibrate, inspect, quantize
from qface.quantization.sensitivity import Sensitivity, sensitivity

__all__ = [
    "AlignmentReport",
    "Budget",
    "DistillConfig",
    "EvaluationResult",
    "LayerBits",
    "OperatingThresholds",
    "Preprocessing",
    "PruningConfig",
    "QFaceError",
    "QuantizationConfig",
    "QuantizationPlan",
    "Sensitivity",
    "SizeReport",
    "TemplateResult",
    "__version__",
    "align",
    "allocate_bits",
    "calibrate",
    "distill",
    "evaluate",
    "evaluate_templates",
    "export",
    "inspect",
    "load",
    "measure_size",
    "operating_thresholds",
    "prune",
    "quantize",
    "save",
    "sensitivity",
    "verify",
    "with_preprocessing",
]
