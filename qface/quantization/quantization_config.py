"""Settings of quantization: bits and observers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from qface.checks import check_choice
from qface.errors import ConfigError

__all__ = ["MAX_BITS", "MIN_BITS", "LayerBits", "QuantizationConfig", "as_config", "check_bits", "check_percentile"]

WeightObserver = Literal["mse", "minmax", "percentile"]
ActivationObserver = Literal["mse", "minmax", "moving_average", "percentile"]

MIN_BITS, MAX_BITS = 2, 8


def check_bits(name: str, bits: int) -> None:
    """Check the bits of a tensor.

    Raises:
        ConfigError: ``bits`` is not an integer from 2 to 8; the message begins with ``name``.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")


def check_percentile(percentile: float) -> None:
    """Check the percentile of an observer.

    Raises:
        ConfigError: it is not > 50 and <= 100.
    """
    if not 50 < percentile <= 100:
        raise ConfigError(f"percentile must be > 50 and <= 100, got {percentile}")


@dataclass(frozen=True)
class LayerBits:
    """Bits of one convolution or linear layer, as an override of the network's.

    Args:
        weight: bits of the weight, 2 to 8; None keeps the network's.
        activation: bits of the input, 2 to 8; None keeps the network's. If several layers consume one tensor, the
            minimum applies.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> QuantizationConfig(6, 6, overrides={"fc": LayerBits(weight=8)}).overrides["fc"].weight
        8
    """

    weight: int | None = None
    activation: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            bits = getattr(self, name)
            if bits is not None:
                check_bits(f"an override's {name}", bits)


@dataclass(frozen=True)
class QuantizationConfig:
    """Bits and observers of a quantized network.

    :mod:`qface.quantization.placement` lists which tensor has which bits.

    Args:
        weight_bits: bits of all convolution and linear weights, 2 to 8 (default 6).
        activation_bits: bits of the inputs of all convolutions and linear layers, 2 to 8 (default 6).
        overrides: bits of single layers, by their name in the network (``"layer1.0.conv1"``).
        weight_observer: observer of weights, per channel: ``"mse"`` (minimum squared quantization error, the default),
            ``"minmax"`` or ``"percentile"``.
        activation_observer: observer of activations, per tensor: one of these three (default ``"mse"``), or
            ``"moving_average"`` of the batches' minima and maxima.
        percentile: percentage of the values inside the range, for ``"percentile"``.
        wide_residuals: True (default) to keep 8 bits for the inputs of residual sums where a convolution that consumes
            the same tensor has fewer (:mod:`qface.quantization.residuals`); False to use the same bits for both.
        ignored_layers: convolutions and linear layers that stay in float, as names or glob patterns (``"layer4.*"``).

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> qface.inspect(teacher, QuantizationConfig(4, 8, ignored_layers=("fc",))).integer_share < 1
        True
    """

    weight_bits: int = 6
    activation_bits: int = 6
    overrides: Mapping[str, LayerBits] = field(default_factory=dict)
    weight_observer: WeightObserver = "mse"
    activation_observer: ActivationObserver = "mse"
    percentile: float = 99.99
    wide_residuals: bool = True
    ignored_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        check_bits("activation_bits", self.activation_bits)
        for name, bits in self.overrides.items():
            if not isinstance(bits, LayerBits):
                raise ConfigError(f"overrides[{name!r}] must be a LayerBits, got {bits!r}")
        check_choice(WeightObserver, weight_observer=self.weight_observer)
        check_choice(ActivationObserver, activation_observer=self.activation_observer)
        if isinstance(self.ignored_layers, str):
            raise ConfigError(f"ignored_layers must be a tuple of names or patterns, got {self.ignored_layers!r}")
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))  # JSON gives a list
        check_percentile(self.percentile)

    def ignores(self, layer: str) -> bool:
        """Return True if ``layer`` stays in float."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignored_layers)

    def weight_bits_of(self, layer: str) -> int:
        """Return the bits of the weight of ``layer``."""
        override = self.overrides.get(layer)
        return override.weight if override and override.weight else self.weight_bits

    def activation_bits_of(self, layer: str) -> int:
        """Return the bits of the input of ``layer``."""
        override = self.overrides.get(layer)
        return override.activation if override and override.activation else self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self) | {"overrides": {name: asdict(bits) for name, bits in self.overrides.items()}}


def as_config(bits: int | QuantizationConfig) -> QuantizationConfig:
    """Return a config with ``bits`` for weights and activations; return a config unchanged.

    Args:
        bits: 2 to 8, or a config.

    Raises:
        ConfigError: ``bits`` is not an integer from 2 to 8.
    """
    if isinstance(bits, QuantizationConfig):
        return bits
    check_bits("bits", bits)
    return QuantizationConfig(weight_bits=bits, activation_bits=bits)
