"""Quantization-aware training on torch.ao's FX graph mode; the only package that imports ``torch.ao``."""

from qface.quantization.calibrate import calibrate, scale_parameters, set_observers
from qface.quantization.calibration_config import CalibrationConfig
from qface.quantization.fake_quantize import (
    ImageFakeQuantize,
    LSQFakeQuantize,
    SharedScaleFakeQuantize,
    WeightFakeQuantize,
)
from qface.quantization.latent_weights import pull_to_integers, weights_follow_scales
from qface.quantization.observers import (
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    RangeObserver,
)
from qface.quantization.placement import Role, activation_bits, role_of
from qface.quantization.plan import LayerPlan, QuantizationPlan
from qface.quantization.prepare import inspect, quantize
from qface.quantization.qparams import IntegerRange, QParams
from qface.quantization.quantization_config import LayerBits, QuantizationConfig
from qface.quantization.quantized_layers import (
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedGlobalAveragePool,
    QuantizedLinear,
    QuantizedPReLU,
)

__all__ = [
    "CalibrationConfig",
    "ImageFakeQuantize",
    "IntegerRange",
    "LSQFakeQuantize",
    "LayerBits",
    "LayerPlan",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "QParams",
    "QuantizationConfig",
    "QuantizationPlan",
    "QuantizedAffine",
    "QuantizedConv2d",
    "QuantizedGlobalAveragePool",
    "QuantizedLinear",
    "QuantizedPReLU",
    "RangeObserver",
    "Role",
    "SharedScaleFakeQuantize",
    "WeightFakeQuantize",
    "activation_bits",
    "calibrate",
    "inspect",
    "pull_to_integers",
    "quantize",
    "role_of",
    "scale_parameters",
    "set_observers",
    "weights_follow_scales",
]
