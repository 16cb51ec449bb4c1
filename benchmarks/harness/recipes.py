"""Benchmark networks, and the recipes that quantize and train them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import qface

NETWORKS = {"mobilefacenet": "mobilefacenet_112x96.safetensors", "iresnet18": "iresnet18.safetensors"}
"""Name of each network and its weight file in ``weights/`` of --data."""

CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """Settings for quantization, calibration and distillation.

    Args:
        quantization: observers and residual settings; the benchmark row sets the bits.
        calibration: settings of :func:`qface.calibrate`.
        training: settings of :func:`qface.distill`; the run sets seed, epochs and steps.
        repair: fit pruned layers to their original outputs, as in :class:`qface.PruningConfig`.
        judged: compare results with the goals.
    """

    quantization: qface.QuantizationConfig
    calibration: qface.CalibrationConfig
    training: qface.DistillConfig
    repair: bool = True
    judged: bool = True


_OURS = Recipe(qface.QuantizationConfig(), qface.CalibrationConfig(), training=qface.DistillConfig())

RECIPES = {
    "qface": _OURS,
    "qface-bf16": replace(_OURS, training=replace(_OURS.training, precision="bf16")),
    "paper": Recipe(
        qface.QuantizationConfig(weight_observer="minmax", activation_observer="minmax", wide_residuals=False),
        qface.CalibrationConfig(equalize=False, gptq=False, correct_biases=False),
        training=qface.DistillConfig.paper(),
        repair=False,
        judged=False,
    ),
}
