"""Quantization, pruning and distillation of face-recognition networks.

One function per stage, each usable alone: ``load``, ``prune``, ``quantize``, ``calibrate``, ``distill``, ``export``,
``evaluate`` and ``save``; ``compress`` runs all stages in one call. ``verify`` checks that an exported file computes
the same as the trained network; ``selftest`` checks it on any machine from the file alone. ``sensitivity`` measures the
loss of each layer at each bit width, ``allocate_bits`` chooses bit widths for a size budget, and
``operating_thresholds`` sets cosine thresholds.
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
    "synthesize",
    "thresholds_of",
    "verify",
    "with_preprocessing",
    "write_tensorboard",
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
