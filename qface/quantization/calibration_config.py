"""Settings of :func:`qface.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass

from qface.checks import check_flag, check_whole
from qface.choices import CALIBRATION_IMAGES

__all__ = ["CalibrationConfig"]


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of calibration. The three methods apply only to a student that was never calibrated.

    Args:
        num_images: size of the calibration set: evenly spaced images of a folder or tensor, the first ones of a loader.
            Mirror images, at most one of each, fill up a smaller set.
        batch_size: images per forward pass.
        equalize: run cross-layer equalization first (:mod:`qface.quantization.cross_layer_equalization`).
        gptq: round weights with GPTQ (:mod:`qface.quantization.gptq`); otherwise to the nearest value.
        correct_biases: after the weights of a layer are rounded, change its bias so that its outputs have the means of
            the float network's (DFQ; Nagel et al., ICCV 2019).

    Raises:
        ConfigError: a field has the wrong type or is out of range.

    Example:
        >>> CalibrationConfig(num_images=64, gptq=False).batch_size
        32
    """

    num_images: int = CALIBRATION_IMAGES
    batch_size: int = 32
    equalize: bool = True
    gptq: bool = True
    correct_biases: bool = True

    def __post_init__(self) -> None:
        check_whole(1, num_images=self.num_images, batch_size=self.batch_size)
        check_flag(equalize=self.equalize, gptq=self.gptq, correct_biases=self.correct_biases)
