"""Names that the library and the command line let a user choose from; help and completion need nothing else.

This module imports nothing of qface, so that ``qface export --help`` does not wait for torch.
"""

from typing import Literal

__all__ = [
    "CALIBRATION_IMAGES",
    "INPUTS",
    "RUNTIMES",
    "TARGETS",
    "WEIGHT_FORMATS",
    "DistillName",
    "FigureKind",
    "ImportanceName",
    "PrecisionName",
    "TemplateProtocol",
]

CALIBRATION_IMAGES = 512
"""Images that :func:`qface.calibrate` looks at by default; more changed no figure."""
INPUTS = ("float32", "uint8")
"""Types that an exported file reads: normalized floats, or the RGB bytes of images."""
RUNTIMES = ("onnxruntime", "openvino")
"""Runtimes that :func:`qface.verify` compares a file in."""
TARGETS = ("cpu", "cuda", "float32")
"""Purposes of a student's file: integers, fp16 on GPUs, float32."""
WEIGHT_FORMATS = ("packed", "int8")
"""Layouts of a student's weights in a file: packed to their bits, or a byte each."""

DistillName = Literal["never", "if-needed", "for-size"]
FigureKind = Literal["roc", "det", "histogram-teacher", "histogram-file", "size", "training"]
ImportanceName = Literal["magnitude", "taylor", "hessian", "fpgm", "bn_scale"]
PrecisionName = Literal["float32", "bf16"]
TemplateProtocol = Literal["paper", "arcface"]
