"""The networks that are measured, and how they are quantized and trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import qface

NETWORKS = {"mobilefacenet": "mobilefacenet_112x96.safetensors", "iresnet18": "iresnet18.safetensors"}
"""Each network, and the file of its weights in ``weights/`` of --data."""

CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """How a network is quantized and trained.

    Args:
        quantization: observers of the ranges; the bits are the row's.
        calibration: settings of :func:`qface.calibrate`.
        training: settings of the distillation; seed and steps are the run's.
        repair: whether what is left of a pruned layer makes up for what went.
        judged: whether goals are held against it.
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
