"""Choices and defaults that the Python verbs and the command line share.

This module imports nothing else of qface, so that ``qface export --help`` does not wait for torch.
"""

from typing import Literal

__all__ = [
    "CALIBRATION_IMAGES",
    "SENSITIVITY_IMAGES",
    "ColorOrder",
    "DistillName",
    "FigureKind",
    "ImportanceName",
    "InputType",
    "PrecisionName",
    "RecipeName",
    "RuntimeName",
    "TargetName",
    "TemplateProtocol",
    "WeightFormatName",
]

CALIBRATION_IMAGES = 512
"""Default size of the calibration set; more images changed no figure."""

SENSITIVITY_IMAGES = 32
"""Default number of images that sensitivity is measured on."""

ColorOrder = Literal["RGB", "BGR"]
DistillName = Literal["never", "if-needed", "for-size"]
FigureKind = Literal["roc", "det", "histogram-teacher", "histogram-file", "size", "stress", "training"]
ImportanceName = Literal["magnitude", "taylor", "hessian", "fpgm", "bn_scale"]
InputType = Literal["float32", "uint8"]
"""Input of an exported file: normalized floats, or the RGB bytes of an image."""
PrecisionName = Literal["float32", "bf16"]
RecipeName = Literal["qface", "paper"]
RuntimeName = Literal["onnxruntime", "openvino"]
"""Runtime that :func:`qface.verify` runs a file in."""
TargetName = Literal["cpu", "cuda", "float32"]
"""Use of a student's file: integers on CPUs, fp16 on GPUs, or float32."""
TemplateProtocol = Literal["paper", "arcface"]
WeightFormatName = Literal["packed", "int8"]
"""Layout of a student's weights in a file: packed to their bits, or one byte per weight."""
