"""Low-bit quantization-aware training on torch.ao's FX graph mode; the only package that imports ``torch.ao``."""

from qface.quantization.calibrate import calibrate, scale_parameters, set_observers
from qface.quantization.config import LayerBits, QuantizationConfig
from qface.quantization.fake_quantize import ImageQuantize, LowBitFakeQuantize, PreActivationQuantize
from qface.quantization.layers import (
    QuantizedAdd,
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedPReLU,
)
from qface.quantization.observers import (
    Grid,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    RangeObserver,
)
from qface.quantization.placement import Role, activation_bits, role_of
from qface.quantization.prepare import is_quantized, quantize

__all__ = [
    "Grid",
    "ImageQuantize",
    "LayerBits",
    "LowBitFakeQuantize",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "PreActivationQuantize",
    "QuantizationConfig",
    "QuantizedAdd",
    "QuantizedAffine",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedPReLU",
    "RangeObserver",
    "Role",
    "activation_bits",
    "calibrate",
    "is_quantized",
    "quantize",
    "role_of",
    "scale_parameters",
    "set_observers",
]
