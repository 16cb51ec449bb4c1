"""Make face-recognition networks small and fast with little loss of accuracy.

One verb per stage: ``load``, ``quantize``, ``calibrate``, ``distill``, ``save``, ``export``, ``verify`` (compare a file
with its student), ``selftest`` (check a file on any machine), ``evaluate``. ``compress`` runs all stages in one call.
``sensitivity`` measures the loss per layer and bits, ``allocate_bits`` chooses bits for a file size, and
``operating_thresholds`` chooses cosine thresholds.
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
    "thresholds_of",
    "verify",
    "with_preprocessing",
    "write_thresholds",
]

if TYPE_CHECKING:
    from qface.api import *
else:

    def __getattr__(name: str) -> Any:
        """Import torch and the rest at the first use, so that the command line handles Ctrl-C before that."""
        if name in __all__:
            return getattr(importlib.import_module("qface.api"), name)
        try:
            return importlib.import_module(f"qface.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module 'qface' has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
