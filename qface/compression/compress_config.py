"""Settings of :func:`qface.compress`: the limits of the file, and the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qface.checks import check_choice
from qface.choices import DistillName
from qface.data.stress import STRESS_CONDITIONS
from qface.distillation.distill_config import DistillConfig
from qface.errors import ConfigError
from qface.quantization.calibration_config import CalibrationConfig
from qface.quantization.quantization_config import QuantizationConfig

__all__ = ["CompressConfig", "CompressionTarget"]


@dataclass(frozen=True)
class CompressionTarget:
    """Limits that a compressed file must meet, all of them together.

    Args:
        max_drop: maximum loss of TPR against the float network, in percentage points. It limits the upper confidence
            bound of the loss, not the measured loss alone.
        max_mb: maximum size of the file in MB (10^6 bytes).
        max_ms: maximum median time per image on one thread of this machine, in ms.
        stress: stress conditions of the probes (:data:`qface.data.stress.STRESS_CONDITIONS`) under which a file must
            meet ``max_drop`` too; the gallery stays unchanged. Each takes as long as an evaluation of unchanged images.
        at_fpr: FPR of that TPR, as a decimal.
        confidence: one-sided confidence of the bound, 0..1, from a bootstrap over people
            (:mod:`qface.evaluation.bootstrap`).

    Raises:
        ConfigError: a value is out of range, a condition is unknown, or ``stress`` is given without ``max_drop``.

    Example:
        >>> CompressionTarget(max_drop=0.5, max_mb=1.0).at_fpr
        '1e-4'
    """

    max_drop: float | None = None
    max_mb: float | None = None
    max_ms: float | None = None
    stress: tuple[str, ...] = ()
    at_fpr: str = "1e-4"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, limit in (("max_drop", self.max_drop), ("max_mb", self.max_mb), ("max_ms", self.max_ms)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise ConfigError(f"{name} must be a number > 0, got {limit}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must be above 0 and below 1, such as 0.95, got {self.confidence}")
        check_choice(STRESS_CONDITIONS, **{f"stress[{at}]": condition for at, condition in enumerate(self.stress)})
        if self.stress and self.max_drop is None:
            raise ConfigError("stress needs a limit on the loss of TPR: set max_drop (--max-drop) as well")

    @property
    def has_limits(self) -> bool:
        """True if there is at least one limit."""
        return (self.max_drop, self.max_mb, self.max_ms) != (None, None, None)


@dataclass(frozen=True)
class CompressConfig:
    """Settings of :func:`qface.compress`.

    Args:
        weight_bits: bits of all weights, 2 to 8, for one file without a search; None searches for bits per weight
            tensor.
        activation_bits: bits of all activations, 2 to 8. They do not change the size of the file.
        distill: ``"if-needed"`` trains if calibration alone misses the target, at fixed bits, and without
            ``max_drop``; ``"for-size"`` also trains smaller files while they meet ``max_drop``; ``"never"`` does not
            train.
        prune: remove channels if the network takes longer than ``max_ms`` at any bits.
        calibration: settings of calibration. The search measures sensitivity on at most 32 of its images.
        training: settings of distillation.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> CompressConfig(weight_bits=6, activation_bits=6, distill="never").weight_bits
        6
    """

    weight_bits: int | None = None
    activation_bits: int = 8
    distill: DistillName = "if-needed"
    prune: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    training: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        QuantizationConfig(8 if self.weight_bits is None else self.weight_bits, self.activation_bits)
        check_choice(DistillName, distill=self.distill)
