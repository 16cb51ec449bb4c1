"""Mixed precision: sensitivity of layers to quantization, and bits per weight tensor for a budget."""

from qface.mixed_precision.allocation import allocate_bits, average_bits, bits_for, draft_file
from qface.mixed_precision.knapsack import choose_bit_widths
from qface.mixed_precision.sensitivity import (
    BIT_WIDTHS,
    SENSITIVITY_IMAGES,
    LayerSensitivity,
    Sensitivity,
    sensitivity,
)

__all__ = [
    "BIT_WIDTHS",
    "SENSITIVITY_IMAGES",
    "LayerSensitivity",
    "Sensitivity",
    "allocate_bits",
    "average_bits",
    "bits_for",
    "choose_bit_widths",
    "draft_file",
    "sensitivity",
]
