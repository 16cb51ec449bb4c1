"""Settings of quantization: bits, and the observer that chooses each range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from qface.errors import ConfigError

__all__ = ["LayerBits", "QuantizationConfig", "as_config"]

WeightObserver = Literal["mse", "minmax", "percentile"]
ActivationObserver = Literal["mse", "minmax", "moving_average", "percentile"]

MIN_BITS, MAX_BITS = 2, 8
OBSERVERS = get_args(ActivationObserver)


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} is {bits!r}; it must be a whole number from {MIN_BITS} to {MAX_BITS}")


@dataclass(frozen=True)
class LayerBits:
    """Bits of one convolution or linear layer that differ from the network's.

    Args:
        weight: bits of its weight, 2 to 8; None keeps the network's.
        activation: bits of the tensor it reads, 2 to 8; None keeps the network's. Where several layers read one tensor,
            the narrowest counts.

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
                _check_bits(f"an override's {name}", bits)


@dataclass(frozen=True)
class QuantizationConfig:
    """Bits and observers of a quantized network. What the bits apply to is :mod:`qface.quantization.placement`.

    Args:
        weight_bits: bits of every convolution and linear weight, 2 to 8.
        activation_bits: bits of every tensor that a convolution or linear layer reads, 2 to 8.
        overrides: other bits for single layers, by their name in the network (``"layer1.0.conv1"``).
        weight_observer: chooses the range of weights, per channel: ``"mse"`` (least squared rounding error),
            ``"minmax"`` or ``"percentile"``.
        activation_observer: chooses the range of activations, per tensor: those three, or ``"moving_average"`` of the
            batches' minima and maxima.
        percentile: share of the values, in percent, that ``"percentile"`` keeps inside the range.
        wide_residuals: let a sum read 8 bits of what a convolution beside it reads with fewer
            (:mod:`qface.quantization.residuals`); otherwise both read the same.
        ignored_layers: convolutions and linear layers that stay in float, by name or by a pattern of file names
            (``"layer4.*"``).

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
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("activation_bits", self.activation_bits)
        for name, bits in self.overrides.items():
            if not isinstance(bits, LayerBits):
                raise ConfigError(f"the override of {name!r} is {bits!r}; it must be a LayerBits")
        if self.weight_observer not in get_args(WeightObserver):
            raise ConfigError(f"weight_observer {self.weight_observer!r} is none of mse, minmax, percentile")
        if self.activation_observer not in OBSERVERS:
            raise ConfigError(f"activation_observer {self.activation_observer!r} is none of {', '.join(OBSERVERS)}")
        if isinstance(self.ignored_layers, str):
            raise ConfigError(f"ignored_layers is {self.ignored_layers!r}; it must be a tuple of names or patterns")
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))  # JSON gives a list
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}; it must be above 50 and at most 100")

    def ignores(self, layer: str) -> bool:
        """True if ``layer`` stays in float."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignored_layers)

    def weight_bits_of(self, layer: str) -> int:
        """Bits of the weight of ``layer``."""
        override = self.overrides.get(layer)
        return override.weight if override and override.weight else self.weight_bits

    def activation_bits_of(self, layer: str) -> int:
        """Bits of the tensor that ``layer`` reads."""
        override = self.overrides.get(layer)
        return override.activation if override and override.activation else self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"overrides": {name: asdict(bits) for name, bits in self.overrides.items()}}


def as_config(bits: int | QuantizationConfig) -> QuantizationConfig:
    """``bits`` for weights and activations alike, or a config as it is.

    Raises:
        ConfigError: ``bits`` is not a whole number from 2 to 8.
    """
    if isinstance(bits, QuantizationConfig):
        return bits
    _check_bits("bits", bits)
    return QuantizationConfig(weight_bits=bits, activation_bits=bits)
