"""All public names of ``qface``; :mod:`qface` imports this module at the first use of one."""

from qface.compression import CompressConfig, Compression, CompressionTarget, compress
from qface.compression.run_record import RunRecord
from qface.data.augmentation import AugmentationConfig
from qface.data.crops import AlignmentReport, align
from qface.data.pair_drawing import make_pairs
from qface.deployment import SelfTest, SizeReport, export, measure_size, selftest, verify
from qface.distillation import DistillConfig, LossConfig, OptimizerConfig, ScheduleConfig, distill
from qface.errors import QFaceError
from qface.evaluation import (
    EvaluationResult,
    GroupsResult,
    IdentificationResult,
    MatchThresholds,
    OperatingThresholds,
    StressResult,
    TemplateResult,
    evaluate,
    evaluate_groups,
    evaluate_identification,
    evaluate_stress,
    evaluate_templates,
    match_thresholds,
    operating_thresholds,
    thresholds_of,
    write_thresholds,
)
from qface.mixed_precision import Sensitivity, allocate_bits, sensitivity
from qface.models import load, save
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.pruning import Budget, PruningConfig, prune
from qface.quantization import (
    CalibrationConfig,
    LayerBits,
    QuantizationConfig,
    QuantizationPlan,
    calibrate,
    inspect,
    quantize,
)
from qface.quantization.bits_file import load_bits, save_bits
from qface.reporting.model_card import model_card
from qface.reporting.plot import plot
from qface.reporting.report.report import report
from qface.reporting.tensorboard import write_tensorboard
from qface.synthesis import SynthesisConfig, synthesize

__all__ = [
    "AlignmentReport",
    "AugmentationConfig",
    "Budget",
    "CalibrationConfig",
    "CompressConfig",
    "Compression",
    "CompressionTarget",
    "DistillConfig",
    "EvaluationResult",
    "GroupsResult",
    "IdentificationResult",
    "LayerBits",
    "LossConfig",
    "MatchThresholds",
    "OperatingThresholds",
    "OptimizerConfig",
    "Preprocessing",
    "PruningConfig",
    "QFaceError",
    "QuantizationConfig",
    "QuantizationPlan",
    "RunRecord",
    "ScheduleConfig",
    "SelfTest",
    "Sensitivity",
    "SizeReport",
    "StressResult",
    "SynthesisConfig",
    "TemplateResult",
    "align",
    "allocate_bits",
    "calibrate",
    "compress",
    "distill",
    "evaluate",
    "evaluate_groups",
    "evaluate_identification",
    "evaluate_stress",
    "evaluate_templates",
    "export",
    "inspect",
    "load",
    "load_bits",
    "make_pairs",
    "match_thresholds",
    "measure_size",
    "model_card",
    "operating_thresholds",
    "plot",
    "prune",
    "quantize",
    "report",
    "save",
    "save_bits",
    "selftest",
    "sensitivity",
    "synthesize",
    "thresholds_of",
    "verify",
    "with_preprocessing",
    "write_tensorboard",
    "write_thresholds",
]
