"""Makes face-recognition networks small and fast without losing what they know.

One verb a stage, each working alone: ``load``, ``quantize``, ``calibrate``, ``distill``, ``export``, ``evaluate``,
``save``, and ``verify``, which proves that a file computes what was trained; ``selftest`` proves it on any machine from
the file alone. ``sensitivity`` says what each layer loses
at each number of bits, ``allocate_bits`` chooses bits for a budget, and ``operating_thresholds`` the cosines to accept.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qface._version import __version__

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
    "MatchThresholds",
    "OperatingThresholds",
    "Preprocessing",
    "PruningConfig",
    "QFaceError",
    "QuantizationConfig",
    "QuantizationPlan",
    "RunRecord",
    "SelfTest",
    "Sensitivity",
    "SizeReport",
    "StressResult",
    "TemplateResult",
    "__version__",
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
    "selftest",
    "sensitivity",
    "thresholds_of",
    "verify",
    "with_preprocessing",
    "write_thresholds",
]

if TYPE_CHECKING:
    from qface.api import *
else:

    def __getattr__(name: str) -> Any:
        """Import torch and all else at the first use, so that the command line is ready for Ctrl-C before that."""
        if name in __all__:
            return getattr(importlib.import_module("qface.api"), name)
        try:
            return importlib.import_module(f"qface.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module 'qface' has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
