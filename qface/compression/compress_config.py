"""The settings of :func:`qface.compress`: what the file must keep, and how it is looked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from qface.checks import check_whole
from qface.choices import CALIBRATION_IMAGES, DistillName
from qface.distillation.distill_config import DistillConfig
from qface.errors import ConfigError
from qface.quantization.quantization_config import QuantizationConfig
from qface.quantization.sensitivity import SENSITIVITY_IMAGES

__all__ = ["CompressConfig", "CompressionTarget"]


@dataclass(frozen=True)
class CompressionTarget:
    """Limits that a compressed file must keep; at least one is given, and all that are given hold together.

    Args:
        max_drop: percentage points of TPR that the file may lose against the float network. The upper confidence bound
            of the loss has to keep it, and not the measured loss alone.
        max_mb: size of the file in MB of 10^6 bytes.
        max_ms: median time of one image on one thread of this machine, in milliseconds.
        at_fpr: false-positive rate of that TPR, as a decimal.
        confidence: one-sided, of the bound, over people (:mod:`qface.evaluation.bootstrap`).

    Raises:
        ConfigError: no limit is given, or a value is out of its range.

    Example:
        >>> CompressionTarget(max_drop=0.5, max_mb=1.0).at_fpr
        '1e-4'
    """

    max_drop: float | None = None
    max_mb: float | None = None
    max_ms: float | None = None
    at_fpr: str = "1e-4"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        limits = {"max_drop": self.max_drop, "max_mb": self.max_mb, "max_ms": self.max_ms}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise ConfigError("there is no target: give at least one of max_drop, max_mb and max_ms")
        for name, limit in given.items():
            if not math.isfinite(limit) or limit <= 0:
                raise ConfigError(f"{name} is {limit}; it must be a number above 0")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}; it must be a number above 0 and below 1, such as 0.95")


@dataclass(frozen=True)
class CompressConfig:
    """Settings of the search of :func:`qface.compress`.

    Args:
        activation_bits: bits of what layers read, 2 to 8. They do not change the size of the file.
        distill: ``"if-needed"`` trains only where calibration alone misses the target, or where ``max_drop`` is not
            given; ``"for-size"`` also trains smaller files, as long as they keep ``max_drop``; ``"never"`` does not
            train.
        prune: remove channels where the network takes longer than ``max_ms`` at any bits.
        sensitivity_images: images that the widths are chosen on.
        calibration_images: images that each trial is calibrated on.
        training: settings of the distillation.

    Raises:
        ConfigError: a value is out of its range.

    Example:
        >>> CompressConfig(distill="never").activation_bits
        8
    """

    activation_bits: int = 8
    distill: DistillName = "if-needed"
    prune: bool = False
    sensitivity_images: int = SENSITIVITY_IMAGES
    calibration_images: int = CALIBRATION_IMAGES
    training: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        QuantizationConfig(activation_bits=self.activation_bits)
        check_whole(1, sensitivity_images=self.sensitivity_images, calibration_images=self.calibration_images)
        if self.distill not in get_args(DistillName):
            raise ConfigError(f"distill is one of {', '.join(get_args(DistillName))}, not {self.distill!r}")
